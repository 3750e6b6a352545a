"""What is easily done wrong in scheduling: counters, who gives way, references, windows, keys, eviction."""

from __future__ import annotations

PLANS, FAIR, ENGINE = (f"tests/engine/test_{name}.py" for name in ("scheduler", "fairness", "engine"))
WINDOWS, NODES = "tests/engine/test_window_cache.py", "tests/engine/test_radix_tree.py"
UNITS = f"{WINDOWS} -k hit_shrinks or all_groups or known_models or shapes"
SCHEDULER, CHAIN, TREE, POOL, GROUPS = (
    f"src/pellucid/engine/{name}.py" for name in ("scheduler", "hash_chain", "radix_tree", "prefix_cache", "layer_groups"))

ORDERS = "src/pellucid/engine/orders.py"

MUTANTS = [
    # --- scheduler
    (SCHEDULER, "key=lambda r: (not r.writing, r.priority, r.number)", "key=lambda r: (r.writing, r.priority, r.number)", FAIR),
    (SCHEDULER, "last = max(self.running, key=lambda r: (r.priority, r.number))", "last = max(self.running, key=lambda r: r.number)", FAIR),
    (SCHEDULER, "last = max(self.running, key=lambda r: (r.priority, r.number))", "last = max(self.running, key=lambda r: r.priority)", FAIR),
    (ORDERS, "sorted(waiting, key=lambda r: (r.priority, r.number))", "sorted(waiting, key=lambda r: r.number)", FAIR),
    (SCHEDULER, "            if request.state is not State.RUNNING:  # no room", "            if False:  # no room", FAIR),
    (SCHEDULER, "r.computed = min(part.start + part.count, len(r.tokens) - 1)", "r.computed = part.start + part.count", ENGINE),
    (SCHEDULER, "min(len(request.tokens) - 1, request.reusable)", "len(request.tokens)", PLANS),
    (SCHEDULER, "        self._extend(request, hit + count)\n", "        self._extend(request, hit)\n", PLANS),
    (SCHEDULER, "        self.cache.claim(held(request.tables))\n", "", PLANS),
    (SCHEDULER, "            self._shorten(r, self._blocks(r.computed + 1))\n", "", f"{ENGINE} -k refused_drafts"),
    (SCHEDULER, "                self._let_go(r)\n", "                pass\n", f"{WINDOWS} -k blocks_that_are_held"),
    (SCHEDULER, "            self.cache.publish(request)\n            self.cache.release([table", "            self.cache.release([table", f"{WINDOWS} -k was_generated"),
    (ORDERS, "for name in here - before:", "for name in ():", FAIR),
    (ORDERS, "self.served.get(r.namespace, 0), r.number))", "r.number))", FAIR),
    (SCHEDULER, "self._blocks(window - 1 + self.budget) + self.cache.stride)", "self._blocks(window - 1))", f"{WINDOWS} -k what_only_fits or room_is"),
    (SCHEDULER, "request.behind <= left - owed and", "request.behind <= left and", FAIR),
    (SCHEDULER, "left - owed and blocks <= self.cache.available()", "left - owed", FAIR),
    (SCHEDULER, " + owed * len(request.tables)", "", FAIR),
    # --- what a window needs
    (POOL, "max(0, computed - window + 1)", "max(0, computed - window + 2)", PLANS),
    (POOL, "max(0, computed - window + 1)", "max(0, computed - window)", f"{WINDOWS} -k hit_shrinks"),
    (GROUPS, "window is None or window >= context", "window is None or window > context", UNITS),
    (GROUPS, "if len({tuple(cache_shapes(", "if False and len({tuple(cache_shapes(", UNITS),
    # --- chain of hashes
    (CHAIN, "for b in reversed(blocks):", "for b in blocks:", PLANS),
    (CHAIN, "                    self.free.move_to_end(b, last=False)\n", "                    pass\n", PLANS),
    (CHAIN, "{self.salt}\\0{request.namespace}", "{self.salt}", PLANS),
    (CHAIN, "request.keys[-1] if request.keys else", "request.keys[-1] if False else", PLANS),
    (CHAIN, "            del self.block_of[group][key]\n", "            pass\n", PLANS),
    (CHAIN, "unbroken = [0 if block == GONE else n + 1", "unbroken = [n if block == GONE else n + 1", UNITS),
    (CHAIN, "        full = tokens // self.size\n", "        full = -(-tokens // self.size)\n", PLANS),
    # --- radix tree
    (TREE, "                self._split(child, count)\n", "                pass\n", PLANS),
    (TREE, "b == GONE or self.references[b] == 1 for b in (node.tables[g][-1] for g in self.lasting))", "True for _ in self.lasting)", NODES),
    (TREE, "            self.idle -= self.references[b] == 1 and self.held[b]\n", "", PLANS),
    (TREE, "age = node.used / self.half_life - stale", "age = -node.used / self.half_life - stale", PLANS),
    (TREE, "math.log2((1 + node.hits) * cell)", "math.log2(cell)", PLANS),
    (TREE, "math.log2((1 + node.hits) * cell)", "math.log((1 + node.hits) * cell)", NODES),
    (TREE, "node.depth + len(node.tokens) / 2)", "node.depth)", NODES),
    (TREE, "node.used / self.half_life - stale", "node.used / self.half_life", NODES),
    (TREE, "            if self.rank(node, stale) > rank:\n", "            if False:\n", NODES),
    (TREE, "            if freed:\n", "            if True:\n", f"{NODES} -k least_worth"),
    (TREE, "        self._look_again()\n        request.published = full\n", "        request.published = full\n", NODES),
    (TREE, "            if not self.queue and not looked:\n", "            if False:\n", NODES),
    (TREE, "child.hits += done >= request.published", "child.hits += 1", NODES),
    (TREE, "done == request.published != prompt)", "done == request.published)", NODES),
    (TREE, "done == request.published != prompt)", "False)", NODES),
    (TREE, "        for stop in (prompt, full):", "        for stop in (full,):", NODES),
    (TREE, "                    table[i] = own\n                    self._hold(own)\n", "                    pass\n", NODES),
    (TREE, "if table[i] != GONE and self.references[table[i]] == 1:", "if table[i] != GONE:", f"{PLANS} {NODES}"),
    (TREE, "self._stale(node, g) if stale else len(table))[::-1]", "self._stale(node, g) if stale else 0)[::-1]", NODES),
    (TREE, "        while full and all(table[full - 1] == GONE", "        while False and all(table[full - 1] == GONE", f"{PLANS} {NODES}"),
    (TREE, "            while node.tables[0] and all(table[-1] == GONE", "            while False and all(table[-1] == GONE", f"{PLANS} {NODES}"),
    (TREE, "            del self.roots[above.key]\n", "            pass\n", f"{NODES} -k can_be_had"),
    (SCHEDULER, "if len(behind) >= self.cache.stride:", "if behind:", NODES),
    (TREE, "                    request.moved = min(request.moved, done + i)\n", "", f"{ENGINE} -k adopts"),
    (TREE, "min(len(tables[0]), most // self.size)", "len(tables[0])", PLANS),
]
