"""The order in which blocks are executed when the lanes of a launch stand in several."""

EXIT = 1 << 30


def successors(program):
    """Of each block the blocks that may follow it."""
    found = []
    for block in program.blocks:
        end, after = block.end, block.index + 1
        if end is None or end.opcode.startswith("bar"):
            following = [after]
        else:
            following = [program.labels[end.operands[0]]] if end.opcode.startswith("bra") else []
            following = [after, *following] if end.guard else following
        found.append([each for each in following if each < len(program.blocks)])
    return found


def ranks(program):
    """Rank of each block: reverse post-order with loops kept together.

    Lanes in the block of the lowest rank go first, so that those which took the longer way around meet the others
    where the paths join: a branch's two sides come before what follows both, a loop before what follows it.
    """
    follow = successors(program)
    loops = natural_loops(follow)

    def leaves(block):
        """Successors, those first that leave more loops: what is visited first is ranked last."""
        count = {each: sum(block in loop and each not in loop for loop in loops) for each in follow[block]}
        return iter(sorted(follow[block], key=lambda each: -count[each]))

    post, seen, stack = [], {0}, [(0, leaves(0))]
    while stack:
        block, rest = stack[-1]
        new = next((each for each in rest if each not in seen), None)
        if new is None:
            post.append(block)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, leaves(new)))
    rank = [len(follow) + 1] * (len(follow) + 1)
    for place, block in enumerate(reversed(post)):
        rank[block] = place
    return rank


def natural_loops(follow):
    """Sets of blocks, one for each edge that goes back to a block which dominates it."""
    before = [[] for _ in follow]
    for block, after in enumerate(follow):
        for each in after:
            before[each].append(block)
    dominators = [1] + [(1 << len(follow)) - 1] * (len(follow) - 1)  # sets of blocks, as bits
    changed = True
    while changed:
        changed = False
        for block in range(1, len(follow)):
            common = (1 << len(follow)) - 1
            for each in before[block]:
                common &= dominators[each]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common
    loops = []
    for block, after in enumerate(follow):
        for head in after:
            if dominators[block] >> head & 1:
                loop, stack = {head}, [block]
                while stack:
                    each = stack.pop()
                    if each not in loop:
                        loop.add(each)
                        stack.extend(before[each])
                loops.append(loop)
    return loops
