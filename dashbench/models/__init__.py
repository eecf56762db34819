"""Checkpoints of four attentions on the stock Llama of transformers; the public names are `load`,
`make_checkpoint` and `generate`, each in the module of its subject."""
