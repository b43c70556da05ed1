"""The portrait world as a benchmark for others: fixed splits, their tasks and their data card."""
