"""Tasks of accuracy suites: RULER from released prompts, and lm-eval's own by name."""
