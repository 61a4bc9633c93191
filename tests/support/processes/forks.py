"""Code in a forked child, for what a fork shares with its parent."""

import os
import pickle
import signal
import traceback


def in_a_fork(function):
    """What ``function()`` returns in a forked child; AssertionError with the child's own error where it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            result = (True, function())
        except BaseException:
            result = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as out:
            out.write(pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        sent = answer.read()
    _, status = os.waitpid(child, 0)
    assert sent, f"the child ended with status {status}"
    done, result = pickle.loads(sent)
    assert done, result
    return result
