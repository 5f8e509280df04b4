/* Self-attention of few tokens with narrow heads, forward and backward (see attention.py, which loads this).
 *
 * Libraries multiply matrices head by head. With heads of two columns such products are too small to pay for their calls;
 * here 16 queries or keys at a time go through registers, and neither scores nor probabilities are ever stored.
 *
 * Layout, all float32 and contiguous: qkv [rows, tokens, 3, heads, width], out [rows, tokens, heads, width],
 * lse [rows, heads, tokens]. tokens <= 16 * MAX_BLOCKS, width <= MAX_WIDTH.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MAX_BLOCKS 16
#define MAX_WIDTH 8
#define VERSION 2

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* One build for every x86-64 processor: the loader picks the variant that this one can run. A test builds each alone. */
#ifdef EACH_PROCESSOR
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR
#endif

/* exp(x) for x < 80 to about 2e-7 of its value; below -87 it is the smallest normal number, not zero. */
INLINE void exponential(vf *x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
    vf t = *x * 1.44269504088896341f;
    vi small = t < -126.0f;
    t = (vf)(((vi)t & ~small) | ((vi)((vf){0} - 126.0f) & small));
    vf whole = t + magic;
    vf f = t - (whole - magic);
    vf p = f * 1.53533619e-4f + 1.33988744e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033244e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.0f;
    *x = (vf)((vi)p + ((vi)whole << 23)) + (t - t); /* what is no number must stay none */
}

INLINE float sum_of(const vf *x) {
    const v8 *halves = (const v8 *)x;
    v8 eight = halves[0] + halves[1];
    const v4 *quarters = (const v4 *)&eight;
    v4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* One part (0: queries, 1: keys, 2: values) of a head as columns, filled up with zeros to whole blocks. */
INLINE void read_columns(const float *qkv, int part, long tokens, long heads, int width, vf to[][MAX_BLOCKS]) {
    const long stride = 3 * heads * width;
    const long blocks = (tokens + LANES - 1) / LANES;
    for (int d = 0; d < width; d++) {
        to[d][blocks - 1] = (vf){0};
        float *column = (float *)to[d];
        for (long t = 0; t < tokens; t++) column[t] = qkv[t * stride + part * heads * width + d];
    }
}

/* Sixteen queries side by side, one key after another; the largest score is looked for only where exp needs it. */
INLINE void forward_head(const float *qkv, float *out, float *lse, long tokens, long heads, int width) {
    vf queries[MAX_WIDTH][MAX_BLOCKS], q[MAX_WIDTH], sums[MAX_WIDTH];
    const long blocks = (tokens + LANES - 1) / LANES, stride = 3 * heads * width;
    const float *keys = qkv + heads * width, *values = keys + heads * width;
    const float scale = 1.0f / sqrtf((float)width);
    read_columns(qkv, 0, tokens, heads, width, queries);
    float longest = 0, largest = 0; /* lengths of queries and keys: no score is above their product */
    for (long t = 0; t < tokens; t++) {
        float a = 0, c = 0;
        for (int d = 0; d < width; d++) {
            a += qkv[t * stride + d] * qkv[t * stride + d];
            c += keys[t * stride + d] * keys[t * stride + d];
        }
        longest = a > longest ? a : longest;
        largest = c > largest ? c : largest;
    }
    longest = sqrtf(longest) * scale;
    largest = sqrtf(largest);
    for (long b = 0; b < blocks; b++) {
        for (int d = 0; d < width; d++) q[d] = queries[d][b] * scale, sums[d] = (vf){0};
        vf top = {0}, total = {0};
        if (longest * largest > 30.0f) { /* the largest score of each query, to keep exp in range */
            top = (vf){0} - INFINITY;
            for (long j = 0; j < tokens; j++) {
                vf s = {0};
                for (int d = 0; d < width; d++) s += q[d] * keys[j * stride + d];
                vi above = s > top;
                top = (vf)(((vi)s & above) | ((vi)top & ~above));
            }
        }
        for (long j = 0; j < tokens; j++) {
            vf p = (vf){0} - top;
            for (int d = 0; d < width; d++) p += q[d] * keys[j * stride + d];
            exponential(&p);
            total += p;
            for (int d = 0; d < width; d++) sums[d] += p * values[j * stride + d];
        }
        for (int d = 0; d < width; d++) sums[d] /= total;
        const long count = tokens - b * LANES < LANES ? tokens - b * LANES : LANES;
        for (long l = 0; l < count; l++) {
            for (int d = 0; d < width; d++) out[(b * LANES + l) * heads * width + d] = ((const float *)&sums[d])[l];
            lse[b * LANES + l] = ((const float *)&top)[l] + logf(((const float *)&total)[l]);
        }
    }
}

/* Sixteen keys side by side, one query after another. */
INLINE void backward_head(const float *qkv, const float *out, const float *lse, const float *g, float *dqkv, long tokens,
                          long heads, int width) {
    vf keys[MAX_WIDTH][MAX_BLOCKS], values[MAX_WIDTH][MAX_BLOCKS];
    vf dkeys[MAX_WIDTH][MAX_BLOCKS], dvalues[MAX_WIDTH][MAX_BLOCKS];
    const long blocks = (tokens + LANES - 1) / LANES, filled = tokens / LANES, stride = 3 * heads * width;
    const float scale = 1.0f / sqrtf((float)width);
    read_columns(qkv, 1, tokens, heads, width, keys);
    read_columns(qkv, 2, tokens, heads, width, values);
    for (int d = 0; d < width; d++)
        for (long b = 0; b < blocks; b++) dkeys[d][b] = dvalues[d][b] = (vf){0};
    /* Keys that are not there are zeros: what they add to a query's gradient is zero, and their own is dropped. */
    for (long i = 0; i < tokens; i++) {
        const float *q = qkv + i * stride, *gi = g + i * heads * width, *oi = out + i * heads * width;
        float mean = 0;
        vf dq[MAX_WIDTH];
        for (int d = 0; d < width; d++) mean += gi[d] * oi[d], dq[d] = (vf){0};
        for (long b = 0; b < blocks; b++) {
            vf p = (vf){0} - lse[i], dp = (vf){0} - mean;
            for (int d = 0; d < width; d++) {
                p += (q[d] * scale) * keys[d][b];
                dp += gi[d] * values[d][b];
            }
            if (b == filled) { /* where no key is, this may be far above 0 */
                vi above = p > 0.0f;
                p = (vf)((vi)p & ~above);
            }
            exponential(&p);
            vf ds = p * dp;
            for (int d = 0; d < width; d++) {
                dvalues[d][b] += p * gi[d];
                dkeys[d][b] += ds * (q[d] * scale);
                dq[d] += ds * keys[d][b];
            }
        }
        for (int d = 0; d < width; d++) dqkv[i * stride + d] = sum_of(&dq[d]) * scale;
    }
    for (int d = 0; d < width; d++) {
        const float *k = (const float *)dkeys[d], *v = (const float *)dvalues[d];
        for (long t = 0; t < tokens; t++) {
            dqkv[t * stride + heads * width + d] = k[t];
            dqkv[t * stride + 2 * heads * width + d] = v[t];
        }
    }
}

/* The width is a constant inside each branch, so that the loops over it are unrolled. */
#define FOR_WIDTH(call) \
    switch (width) {    \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 4: call(4); break; \
    case 8: call(8); break; \
    default: call(width);   \
    }

EACH_PROCESSOR
void attention_forward(const float *qkv, float *out, float *lse, long rows, long tokens, long heads, int width) {
    const long wide = heads * width;
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const float *from = qkv + r * tokens * 3 * wide + h * width;
            float *to = out + r * tokens * wide + h * width, *l = lse + (r * heads + h) * tokens;
#define CALL(w) forward_head(from, to, l, tokens, heads, w)
            FOR_WIDTH(CALL)
#undef CALL
        }
}

EACH_PROCESSOR
void attention_backward(const float *qkv, const float *out, const float *lse, const float *g, float *dqkv, long rows,
                        long tokens, long heads, int width) {
    const long wide = heads * width;
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const long at = r * tokens * wide + h * width;
            const float *from = qkv + r * tokens * 3 * wide + h * width, *l = lse + (r * heads + h) * tokens;
            float *to = dqkv + r * tokens * 3 * wide + h * width;
#define CALL(w) backward_head(from, out + at, l, g + at, to, tokens, heads, w)
            FOR_WIDTH(CALL)
#undef CALL
        }
}

int attention_version(void) { return VERSION; }
