"""What a serving engine needs between steps: state by slot, history, prefetched rows."""
