"""Everything that comes from outside in a checkpoint's own format: configuration, tokenizer, chat template."""
