"""Does it align? Every table of docs/evidence.md from nothing: `make evidence`, or `python -m benchmarks.evidence`.

Each result is a folder under runs/evidence that is made by commands of `inpo`, listed in its commands.txt. Work that is
done is not done again, so the whole can be stopped and started at any time.
"""
