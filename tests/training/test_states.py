"""What optimizers take for a state: facts in files may be anything, and so may dictionaries."""

import pytest

from .test_saving import changed, optimizer, same, states

FACTS = [("steps", 2**63), ("skipped", 10**30), ("seed", 2**64), ("seed", -(2**63) - 1)]
GROUPS = [("betas", x) for x in ([0.9], 0.9, [0.9, "0"], {"a": 1, "b": 0.5}, None, [0.1, 1.0])]
GROUPS += [("eps", None), ("eps", 10**400), ("weight_decay", [0.1]), ("lr", True), ("lr", -1.0), ("lr", "1")]


def refused(made, call, message):
    before = states(made), made.facts(), dict(made.param_groups[0])
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert same(states(made), before[0]) and made.facts() == before[1] and made.param_groups[0] == before[2]


def both_ways(tmp_path, monkeypatch, content, message):
    """As a dictionary, and as a file with such a header."""
    made, other = optimizer(), optimizer()
    refused(made, lambda: made.load_state_dict(content), f"^RowAdam.load_state_dict: {message}")
    monkeypatch.setattr(other, "state_dict", lambda: content)
    path = other.save_safetensors(tmp_path)
    refused(made, lambda: made.load_safetensors(path), f"^RowAdam.load_safetensors: {message}")


@pytest.mark.parametrize(("name", "value"), FACTS)
def test_counts_beyond_int64(tmp_path, monkeypatch, name, value):
    both_ways(tmp_path, monkeypatch, changed(optimizer().state_dict(), **{name: value}), f"{name} must be an int")


@pytest.mark.parametrize(("name", "value"), GROUPS)
def test_rates_that_are_none(tmp_path, monkeypatch, name, value):
    content = optimizer().state_dict()
    content |= {"param_groups": [content["param_groups"][0] | {name: value}]}
    both_ways(tmp_path, monkeypatch, content, f"{name} must be a")


def test_a_token_map_that_is_no_digest(tmp_path, monkeypatch):
    content = optimizer().state_dict()
    tables = [table | {"token_map": 5} for table in content["row_optimizer"]["tables"]]
    both_ways(tmp_path, monkeypatch, changed(content, tables=tables), "token_map must be a text or None, got int 5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x], "state_dict must be a Mapping, got list"),
        (lambda x: None, "state_dict must be a Mapping, got NoneType"),
        (lambda x: x | {"state": [1]}, r"state_dict\['state'\] must be a mapping .*, got list"),
        (lambda x: x | {"state": {0: 3}}, r"state_dict\['state'\] must be a mapping .*, got dict"),
        (lambda x: x | {"param_groups": 3}, r"state_dict\['param_groups'\] must be a sequence of .*, got int 3"),
        (lambda x: x | {"param_groups": [3]}, r"state_dict\['param_groups'\]\[0\] must be a Mapping, got int 3"),
        (lambda x: x | {"param_groups": x["param_groups"] * 2}, "expected 1 parameter groups, got 2"),
        (
            lambda x: x | {"state": {i: {n: t.to("meta") for n, t in s.items()} for i, s in x["state"].items()}},
            "0.first must be a tensor with content, got one on the meta device",
        ),
    ],
)
def test_dictionaries_that_are_no_states(change, message):
    made, content = optimizer(), change(optimizer().state_dict())
    refused(made, lambda: made.load_state_dict(content), f"^RowAdam.load_state_dict: .*{message}")
