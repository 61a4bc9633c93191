"""What each instruction of the PTX computes, and its translation to Python."""
