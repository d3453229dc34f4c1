from math import comb


def full_tree(L, n_choices):
    return sum(n_choices ** length for length in range(1, L + 1))  # all prefixes of each length but 0, the root


def tree_of_k(L, k):
    # A prefix with b BIG can be completed if 0 <= k - b <= L - length; there are C(length, b) of them.
    return sum(comb(length, b) for length in range(1, L + 1)
               for b in range(max(0, k - (L - length)), min(k, length) + 1))


def saving(L, n_choices, k=None):
    # A binary tree's last layers hold most of its edges, so it saves a factor of about L / 2; a tree of three choices
    # is thicker still at its end: 2 L / 3. A budget forces the last choices, and long thin ends are shared by nobody.
    if k is None:
        return n_choices ** L * L / full_tree(L, n_choices)
    return comb(L, k) * L / tree_of_k(L, k)
