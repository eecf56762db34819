"""A small Llama trained on long-context retrieval, and continued with each sparse attention."""
