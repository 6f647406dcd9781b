"""One file per question asked of a detached Jacobian; each takes the operator and returns a plain dataclass."""
