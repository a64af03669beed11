"""The embedded default: a tiny real text-to-image world with a known preference (docs/toyworld.md)."""
