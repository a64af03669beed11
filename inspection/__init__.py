"""Looking at a cache: what it holds, whether it is whole, what a pair looks like, and whether it has aged."""
