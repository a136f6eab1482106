"""Names of solvers and preconditioners: settings need them, and shall not wait for JAX."""

SOLVERS = ("lissa", "cg", "datainf", "identity", "ekfac", "low_rank", "exact")
PRECONDITIONERS = ("none", "ekfac", "diagonal")
