"""Networks: `decoder` computes what a `DecoderSpec` says; each family has a file that makes one from its
configuration."""
