"""What it takes: measured here, never in a test."""
