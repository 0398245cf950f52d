"""What happens to a row: read, embed, replace, summarize, and what they stand on."""
