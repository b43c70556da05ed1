"""The suites of photographs: DreamBench, and a user's own folder of photos."""
