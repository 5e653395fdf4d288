"""What ``biomedgpt-edge bench`` does: stages of real requests, timed in rounds, held against the machine's limits."""
