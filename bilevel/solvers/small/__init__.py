"""Small problems, solved on the host: an NLP method of SciPy over values and dense Jacobians that JAX compiles."""
