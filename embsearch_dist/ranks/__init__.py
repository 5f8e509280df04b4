"""The ranks of a job: the process group, what each needs before it starts, and what all must agree on."""
