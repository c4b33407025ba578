"""What tests/gpu.sh runs: a module a part, each with run(context)."""
