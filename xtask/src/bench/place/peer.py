"""Nova's own numa_fit_instance_to_host on the hosts and guests of a file, as one line of JSON.

    peer.py fit FILE              every guest on every host: answers, and fits a second
    peer.py fleet FILE HOSTS      every guest on HOSTS hosts (those of the file again and again), as its scheduler's
                                  filter looks at each: placements a second
    peer.py worst FILE SECONDS    FILE holds a host and a guest; gives up after SECONDS
"""
import itertools
import json
import logging
import signal
import sys
import time
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import nova.conf
from nova import exception, objects
from nova.virt import hardware

nova.conf.CONF([], project="nova", default_config_files=[])
objects.register_all()

PAGES = {"small": -1, "large": -2, "any": -3}


def host(spec):
    return objects.NUMATopology(cells=[
        objects.NUMACell(
            id=c["id"], cpuset=set(c["shared_cpus"]), pcpuset=set(c["dedicated_cpus"]), memory=c["memory_mib"],
            memory_usage=c["memory_used_mib"], cpu_usage=c["shared_cpus_used"], pinned_cpus=set(c["pinned_cpus"]),
            siblings=[set(s) for s in c["siblings"]], socket=None,
            mempages=[objects.NUMAPagesTopology(size_kb=p["size_kib"], total=p["total"], used=p["used"],
                                                reserved=p["reserved"]) for p in c["page_pools"]])
        for c in spec["cells"]])


def guest(spec):
    return objects.InstanceNUMATopology(
        emulator_threads_policy=spec["emulator_threads_policy"],
        cells=[objects.InstanceNUMACell(
            id=i, cpuset=set(c["shared_vcpus"]), pcpuset=set(c["dedicated_vcpus"]), memory=c["memory_mib"],
            pagesize=PAGES.get(c["page_size"], c["page_size"]), cpu_policy=c["cpu_policy"],
            cpu_thread_policy=c["cpu_thread_policy"]) for i, c in enumerate(spec["cells"])])


def fit(topology, wanted, limits):
    return hardware.numa_fit_instance_to_host(topology, wanted, None, limits=limits) is not None


def exact(spec, wanted, limits):
    """The same by Nova's rule for one cell, cell by cell: its cache mixes the cells of a guest up now and then."""
    def holds(cell, index):
        topology, instance = host({"cells": [cell]}), guest(wanted)
        reserved = 1 if index == 0 and instance.emulator_threads_isolated else 0
        try:
            return hardware._numa_fit_instance_cell(
                topology.cells[0], instance.cells[index], limits, reserved) is not None
        except exception.MemoryPageSizeNotSupported:
            return False
    rows = [[holds(cell, i) for cell in spec["cells"]] for i in range(len(wanted["cells"]))]
    numbers = range(len(spec["cells"]))
    return any(all(row[at] for row, at in zip(rows, places))
               for places in itertools.permutations(numbers, len(rows)))


def main():
    what, path = sys.argv[1:3]
    with open(path) as file:
        cases = json.load(file)
    limits = cases.get("limits")
    limits = limits and objects.NUMATopologyLimits(**limits)
    if what == "worst":
        topology, wanted = host(cases["host"]), guest(cases["guest"])
        signal.alarm(int(sys.argv[3]))
        started = time.perf_counter()
        answer = fit(topology, wanted, limits)
        print(json.dumps({"us": (time.perf_counter() - started) * 1e6, "answer": answer}))
        return
    hosts = [host(spec) for spec in cases["hosts"]]
    clock = time.perf_counter
    times, answers = [], []
    if what == "fit":
        for spec, topology in zip(cases["hosts"], hosts):
            for wanted in cases["guests"]:
                instance = guest(wanted)
                started = clock()
                fit(topology, instance, limits)
                times.append(clock() - started)
                answers.append(exact(spec, wanted, limits))
    else:
        for wanted in cases["guests"]:
            busy = 0.0
            for topology in itertools.islice(itertools.cycle(hosts), int(sys.argv[3])):
                instance = guest(wanted)
                started = clock()
                fit(topology, instance, limits)
                busy += clock() - started
            times.append(busy)
    times.sort()
    print(json.dumps({"per_s": len(times) / sum(times), "p99_us": times[len(times) * 99 // 100] * 1e6,
                      "answers": answers}))


main()
