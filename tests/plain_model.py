"""The memory model of docs/model.md once more, written plainly: chunk by chunk, without SimPy, trains or policies.

An independent second opinion for `test_plain_model.py`. Eviction is LRU or FIFO; predictions are given.
"""

FREE, AWAITED, HELD = "free", "awaited", "held"


class Move:
    """One expert on its way."""

    def __init__(self, key, target, chunks, demand=False, refresh=False):
        self.key, self.target, self.left, self.moved = key, target, chunks, 0
        self.demand, self.refresh, self.started = demand, refresh, False


class PlainModel:
    """`unions` [event] maps keys to tokens, `predicted` [event] lists (ahead, keys)."""

    def __init__(self, unions, predicted, setting, costs, eviction, drop_unused, reupload):
        self.unions, self.predicted, self.costs = unions, predicted, costs
        self.layers, self.experts = setting.layers, setting.experts
        self.pool_of, self.capacity = setting.pool_of.tolist(), setting.capacity.tolist()
        self.renews_on_hit, self.drop_unused, self.reupload = eviction == "lru", drop_unused, reupload
        self.residents = [[] for _ in self.capacity]  # oldest first
        self.hold, self.moves, self.unused = {}, {}, {}
        self.demands, self.prefetches, self.moving, self.whole = [], [], None, []
        self.chunks, self.committed = 1, 0
        self.time = self.chunk_start = self.chunk_end = self.busy = 0
        self.chunk_ended = -1
        self.event, self.ending = -1, None  # ending: (time, keys, event) of an event that is being computed
        self.bytes = dict.fromkeys(("demand", "useful", "late", "wasted", "refresh"), 0)
        self.started = self.cancelled = self.peak = 0
        self.selected, self.predictions = {}, [0, 0, 0]
        self.awaited, self.arrivals = set(), []

    # ---- slots

    def pool(self, key):
        return self.pool_of[key // self.experts]

    def resident(self, key):
        return key in self.residents[self.pool(key)]

    def evict(self, key):
        self.residents[self.pool(key)].remove(key)
        del self.hold[key]
        if self.unused.pop(key, None):
            self.bytes["wasted"] += self.costs.expert_bytes
        if key in self.moves:
            self.prefetches.remove(self.moves.pop(key))

    def give_up(self, move):
        del self.moves[move.key]
        self.cancelled += 1
        if move.started:
            self.unused.pop(move.key, None)
            self.bytes["refresh" if move.refresh else "wasted"] += move.moved * self.costs.chunk_bytes
            self.evict(move.key)

    def make_room(self, pool, demand):
        if len(self.residents[pool]) < self.capacity[pool]:
            return True
        for leaving in ([FREE], [AWAITED])[: 2 if demand else 1]:
            for key in self.residents[pool]:
                if self.hold[key] in leaving:
                    self.evict(key)
                    return True
        for paused in self.prefetches if demand else ():
            if paused.started and self.pool(paused.key) == pool:
                self.prefetches.remove(paused)
                self.give_up(paused)
                return True
        assert not demand
        return False

    # ---- link

    def start(self, move):
        if not move.refresh:
            if not self.make_room(self.pool(move.key), move.demand):
                self.cancelled += 1
                del self.moves[move.key]
                return False
            self.residents[self.pool(move.key)].append(move.key)
            self.peak = max(self.peak, sum(map(len, self.residents)))
            if move.demand:
                self.bytes["demand"] += self.costs.expert_bytes
            else:
                self.started += 1
                self.unused[move.key] = move
        self.hold[move.key] = HELD
        move.started = True
        return True

    def serve(self):
        while self.moving is None and (self.demands or self.prefetches):
            move = (self.demands or self.prefetches).pop(0)
            if move.started or self.start(move):
                self.moving = move
                if move.demand:  # else it goes on in chunks, even if it becomes a demand on the way
                    self.whole.append(move)
                self.next_chunk()

    def next_chunk(self):
        self.chunk_start = self.time
        self.chunk_end = self.time + (self.costs.last_chunk_ns if self.moving.left == 1 else self.costs.chunk_ns)
        self.chunks = 1
        if self.costs.demand_ns and self.moving.demand and self.moving in self.whole:
            self.chunk_end, self.chunks = self.time + self.costs.demand_ns[self.moving.left], self.moving.left
        if self.chunk_ended != self.time:  # the link was idle
            self.chunk_end += self.costs.link_start_ns

    def chunk_ends(self):
        move = self.moving
        self.time = self.chunk_ended = self.chunk_end
        self.busy += self.chunk_end - self.chunk_start
        move.left -= self.chunks
        move.moved += self.chunks
        if move.left and self.demands and not move.demand and self.committed:
            self.committed -= 1
            self.next_chunk()
            return
        if move.left and (move.demand or not self.demands):
            self.next_chunk()
            return
        self.moving = None
        if not move.left:
            self.land(move)
        elif move.refresh or move.target > self.event:
            self.prefetches.insert(0, move)
        else:
            self.give_up(move)
        self.serve()

    def land(self, move):
        del self.moves[move.key]
        if move.refresh:
            self.bytes["refresh"] += self.costs.expert_bytes
        if move.demand:
            self.arrivals.append((self.time, move.key))
            self.awaited.discard(move.key)
        elif move.refresh or move.target <= self.event:
            self.hold[move.key] = FREE
            if self.drop_unused and not move.refresh:
                self.evict(move.key)
        else:
            self.hold[move.key] = AWAITED

    def go_on(self, until):
        """Let time pass; at one instant: events end, then experts land, then the next event starts."""
        while True:
            ends = self.chunk_end if self.moving else None
            if self.ending and self.ending[0] <= until and (ends is None or self.ending[0] <= ends):
                self.time = max(self.time, self.ending[0])
                self.end_event()
            elif ends is not None and (ends < until or (ends == until and self.moving.left == 1)):
                self.chunk_ends()
            else:
                break
        self.time = max(self.time, until)

    def finish_what_takes_no_time(self):
        while self.moving and self.chunk_start == self.chunk_end == self.time:
            self.chunk_ends()

    # ---- events

    def end_event(self):
        _, keys, event = self.ending
        self.ending = None
        self.release(keys)
        for key, move in list(self.unused.items()):
            if move.target == event and key not in self.moves:
                self.hold[key] = FREE
                if self.drop_unused:
                    self.evict(key)

    def release(self, keys):
        for key in keys:
            self.hold[key] = FREE

    def judge(self, union):
        present = [key for key in union if self.resident(key) and key not in self.moves]
        late = [key for key in union if self.resident(key) and key in self.moves]
        absent = [key for key in union if not self.resident(key)]
        for key in union:
            if self.resident(key):
                if self.unused.pop(key, None):
                    self.bytes["late" if key in self.moves else "useful"] += self.costs.expert_bytes
                if self.renews_on_hit:
                    order = self.residents[self.pool(key)]
                    order.append(order.pop(order.index(key)))
        selected = self.selected.pop(self.event, None)
        if selected is not None:
            found = len(selected), len(selected & set(union)), len(union)
            self.predictions = [old + new for old, new in zip(self.predictions, found, strict=True)]
        for move in list(self.prefetches):
            if move.target <= self.event and not move.refresh and move.key not in union:
                self.prefetches.remove(move)
                self.give_up(move)
        return present, late, absent

    def ask_for(self, keys):
        for key in keys:
            self.awaited.add(key)
            move = self.moves.get(key)
            if move is None and self.resident(key):
                self.arrivals.append((self.time, key))
                self.awaited.discard(key)
            elif move is None:
                self.moves[key] = move = Move(key, self.event, self.costs.chunks, demand=True)
                self.demands.append(move)
            elif not move.demand:
                move.demand = True
                if move is not self.moving:
                    self.prefetches.remove(move)
                    self.demands.append(move)

    def predict(self):
        for ahead, keys in self.predicted[self.event]:
            self.selected.setdefault(self.event + ahead, set()).update(keys)
            for key in keys:
                if not self.resident(key) and key not in self.moves:
                    self.moves[key] = Move(key, self.event + ahead, self.costs.chunks)
                    self.prefetches.append(self.moves[key])

    def run(self):
        """Return [compute, wait, host, hits, late hits, misses] of every step, and the time at which the last ends."""
        costs, steps = self.costs, []
        host = compute = 0
        takes = costs.expert_ns.tolist()
        for attention, head in zip(costs.attention_ns.tolist(), costs.step_ns.tolist(), strict=True):
            computed = waited = hits = lates = misses = 0
            before = compute
            for _ in range(self.layers):
                starts = max(compute, host)
                if costs.beside_ns:
                    self.go_on(starts)
                    self.finish_what_takes_no_time()
                longer = costs.beside_ns if self.moving else 0
                gate_end = max(starts + attention + longer, host + costs.host_gate_ns)
                computed += attention + longer
                self.go_on(gate_end + costs.readout_ns)
                if self.ending:
                    self.end_event()
                self.event += 1
                union = self.unions[self.event]
                compute = host = gate_end + costs.readout_ns + costs.host_experts_ns
                present, late, absent = self.judge(union)
                hits, lates, misses = hits + len(present), lates + len(late), misses + len(absent)
                waves = [[*present, *late]]
                slots = self.capacity[self.pool(next(iter(union)))] if union else 0
                for key in absent:
                    if len(waves[-1]) == slots:
                        waves.append([])
                    waves[-1].append(key)
                for number, wave in enumerate(waves):
                    if number:
                        self.go_on(compute)
                        self.release(waves[number - 1])
                    self.hold.update(dict.fromkeys(wave, HELD))
                    self.arrivals, self.awaited = [], set()
                    self.ask_for(key for key in wave if number or key not in present)
                    if number == 0:
                        self.predict()
                        together = sum(takes[union[key]] for key in present) + (costs.group_ns if present else 0)
                        compute += together
                        computed += together
                    self.committed = costs.committed_chunks  # what the copy engine has besides when it is asked to give way
                    self.serve()
                    if number == 0 and present and self.moving:
                        compute += costs.beside_ns
                        computed += costs.beside_ns
                    while self.awaited:
                        self.chunk_ends()
                    self.finish_what_takes_no_time()
                    for place, (landed, key) in enumerate(self.arrivals):
                        alone = place + 1 == len(self.arrivals) and not self.moving
                        spent = costs.group_ns + takes[union[key]] + (0 if alone else costs.beside_ns)
                        waited += max(0, landed - compute)
                        compute = max(compute, landed) + spent
                        computed += spent
                self.ending = compute, waves[-1], self.event
                if self.reupload:
                    self.go_on(compute)
                    if self.ending:
                        self.end_event()
                    for key in union:
                        if self.resident(key) and key not in self.moves:
                            self.moves[key] = Move(key, self.event, costs.chunks, refresh=True)
                            self.prefetches.append(self.moves[key])
                    self.serve()
            host += costs.host_step_ns
            compute = max(compute + head, host)
            computed += head
            if costs.step_readout_ns >= 0:
                host = compute + costs.step_readout_ns
            steps.append([computed, waited, compute - before - computed - waited, hits, lates, misses])
        self.go_on(compute)
        if self.moving:
            self.busy += compute - self.chunk_start
        self.bytes["wasted"] += len(self.unused) * costs.expert_bytes
        return steps, compute
