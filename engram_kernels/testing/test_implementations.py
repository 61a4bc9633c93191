"""The suite: each case of each implementation, or of our own ops where none is named."""


def test_case(implementation_case):
    implementation_case()
