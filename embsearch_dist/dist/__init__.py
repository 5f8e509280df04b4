"""Process group, sharding of tables over ranks, and reductions over sharded tables."""
