"""One file per model family: where its files lie, what its tensors are called, its configuration and its template."""
