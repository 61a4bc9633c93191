"""What pytest loads by itself where this package is installed: it brings the plugin in for ``--pyargs`` of this suite.

Options of a suite inside a package are unknown to pytest before it collects: it reads no conftest of ``--pyargs`` in
advance. For every other run this does nothing, and no option is added.
"""

PACKAGE, SUITE = "engram_kernels", "engram_kernels.testing"


def pytest_load_initial_conftests(early_config, args):
    """Options are still open here, and the command line is known."""
    asked = any(str(arg) == PACKAGE or str(arg).startswith(SUITE) for arg in args)
    if asked and early_config.known_args_namespace.pyargs:
        early_config.pluginmanager.import_plugin(f"{SUITE}.plugin")
