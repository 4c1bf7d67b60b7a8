"""What `vllm bench` runs."""
