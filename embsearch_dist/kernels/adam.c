/* Adam for the rows that a batch looked up (see adam.py, which loads this and states the formula).
 *
 * Table by table: a hash table of the batch's ids gives each row a place, gradients of equal rows are added there in the
 * order of the batch, then every row that was looked up is updated once. The cost follows the batch; nothing is kept
 * between calls. Products and sums are not contracted (setup.py), so that every processor computes the same bits.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 1
#define AHEAD 12 /* rows that are fetched before they are needed */
#define INLINE static inline __attribute__((always_inline))

/* One build for every x86-64 processor: the loader picks the variant that this one can run. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR
#endif

typedef struct {
    float beta1, beta2; /* decay of the moments */
    float rest1, rest2; /* 1 - beta, which float32 of beta would lose digits of */
    float rate;         /* learning rate / (1 - beta1^t) */
    float scale;        /* 1 / sqrt(1 - beta2^t) */
    float eps;
    int32_t elements; /* leave elements alone whose gradient is zero */
} numbers;

/* What the batch has looked up in one table. */
typedef struct {
    uint32_t *places; /* hash table of place + 1; 0 is free */
    int64_t *rows;    /* by place */
    float *sums;      /* gradient by place */
    int shift;
    uint64_t mask;
} scratch;

INLINE int64_t place_of(scratch *s, int64_t row, int64_t *count) {
    uint64_t at = ((uint64_t)row * UINT64_C(0x9E3779B97F4A7C15)) >> s->shift;
    for (;; at = (at + 1) & s->mask) {
        const uint32_t found = s->places[at];
        if (!found) {
            s->rows[*count] = row;
            s->places[at] = (uint32_t)(*count + 1);
            return (*count)++;
        }
        if (s->rows[found - 1] == row) return found - 1;
    }
}

INLINE void update_row(float *restrict w, float *restrict m, float *restrict v, const float *restrict g, long width,
                       const numbers *n, int elements) {
    for (long d = 0; d < width; d++) {
        const float first = n->beta1 * m[d] + n->rest1 * g[d];
        const float second = n->beta2 * v[d] + n->rest2 * g[d] * g[d];
        const float to = w[d] - n->rate * first / (__builtin_sqrtf(second) * n->scale + n->eps);
        const int moves = !elements || g[d] != 0.0f;
        m[d] = moves ? first : m[d];
        v[d] = moves ? second : v[d];
        w[d] = moves ? to : w[d];
    }
}

INLINE void update_table(scratch *s, long bags, const float *gradient, long stride, const int64_t *ids,
                         const int64_t *offsets, const float *weights, int64_t height, float *w, float *m, float *v,
                         long width, const numbers *n) {
    int64_t count = 0;
    for (long b = 0; b < bags; b++) {
        const float *g = gradient + b * stride;
        for (int64_t i = offsets[b]; i < offsets[b + 1]; i++) {
            if (ids[i] < 0 || ids[i] >= height) continue; /* the look-up has refused or mended these */
            const float factor = weights ? weights[i] : 1.0f;
            const int64_t before = count, place = place_of(s, ids[i], &count);
            float *sum = s->sums + place * width;
            if (place == before)
                for (long d = 0; d < width; d++) sum[d] = factor * g[d];
            else
                for (long d = 0; d < width; d++) sum[d] += factor * g[d];
        }
    }
    for (int64_t k = 0; k < count; k++) {
        if (k + AHEAD < count) {
            const int64_t next = s->rows[k + AHEAD] * width;
            for (long d = 0; d < width; d += 16) {
                __builtin_prefetch(w + next + d, 1);
                __builtin_prefetch(m + next + d, 1);
                __builtin_prefetch(v + next + d, 1);
            }
        }
        const int64_t at = s->rows[k] * width;
        const float *g = s->sums + k * width;
        if (n->elements)
            update_row(w + at, m + at, v + at, g, width, n, 1);
        else
            update_row(w + at, m + at, v + at, g, width, n, 0);
    }
}

/* The width is a constant inside each branch, so that the loops over it are unrolled. */
#define FOR_WIDTH(width, call) \
    switch (width) {           \
    case 4: call(4); break;    \
    case 8: call(8); break;    \
    case 16: call(16); break;  \
    case 32: call(32); break;  \
    case 64: call(64); break;  \
    default: call(width);      \
    }

/* Update ``tables`` tables. Returns 0, or 1 where memory is short; nothing is written then.
 *
 * gradient [bags, stride]: of the pooled embeddings; table t has the columns from starts[t].
 * offsets [tables * bags + 1]: bag b of table t holds the look-ups offsets[t * bags + b] to the next one.
 * ids, weights [look-ups]: rows, and what each was multiplied with (NULL: 1).
 * heights, widths, places [tables]: rows and columns of each, and where it begins in w, m and v.
 */
EACH_PROCESSOR
int adam_update(long tables, long bags, const float *gradient, long stride, const int64_t *starts, const int64_t *offsets,
                const int64_t *ids, const float *weights, const int64_t *heights, const int64_t *widths,
                const int64_t *places, float *w, float *m, float *v, const numbers *n) {
    int64_t most = 0, numbers_of = 0;
    for (long t = 0; t < tables; t++) {
        const int64_t found = offsets[(t + 1) * bags] - offsets[t * bags];
        most = found > most ? found : most;
        numbers_of = found * widths[t] > numbers_of ? found * widths[t] : numbers_of;
    }
    if (!most) return 0;
    int bits = 4;
    while ((INT64_C(1) << bits) < 2 * most) bits++;
    scratch s = {malloc(sizeof(uint32_t) << bits), malloc(most * sizeof(int64_t)), malloc(numbers_of * sizeof(float)), 0, 0};
    const int good = s.places && s.rows && s.sums && most < INT64_C(1) << 31;
    for (long t = 0; good && t < tables; t++) {
        const int64_t *bag = offsets + t * bags, found = bag[bags] - bag[0];
        if (!found) continue;
        for (bits = 4; (INT64_C(1) << bits) < 2 * found;) bits++;
        s.shift = 64 - bits, s.mask = (UINT64_C(1) << bits) - 1;
        memset(s.places, 0, sizeof(uint32_t) << bits);
        float *wt = w + places[t], *mt = m + places[t], *vt = v + places[t];
        const float *g = gradient + starts[t];
#define CALL(width) update_table(&s, bags, g, stride, ids, bag, weights, heights[t], wt, mt, vt, width, n)
        FOR_WIDTH(widths[t], CALL)
#undef CALL
    }
    free(s.places), free(s.rows), free(s.sums);
    return !good;
}

int adam_version(void) { return VERSION; }
