"""`deepzoo doctor`: what works on this machine, what does not, and what to do about it."""

import dataclasses
import json
from dataclasses import dataclass

from deepzoo.zoo import doctor, machine
from deepzoo.zoo.cli import display


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, devices, kernels, memory, disk, sandbox, extras.

    A line each: ok works, off does not work here though the rest does, fail keeps deepzoo from
    working; the exit status is 1 if any fails. Nothing is downloaded or changed.

    Example: deepzoo doctor --json
    """

    json: bool = False
    """Print findings and facts as JSON."""


def run(command: Doctor) -> int:
    """Prints the findings and returns the exit status."""
    with display.waiting("looking at this machine"):
        facts = machine.look()
        # Counting sizes needs JAX in this process, which is of no use where it does not start.
        sizes = [] if isinstance(facts.backend, str) else doctor.catalog_sizes()
    findings = doctor.diagnose(facts, sizes)
    works = doctor.works(findings)
    if command.json:
        told = [finding._asdict() for finding in findings]
        found = {"works": works, "findings": told, "machine": dataclasses.asdict(facts)}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(report(findings)))
    return 0 if works else 1


def report(findings: list[doctor.Finding]) -> list[str]:
    """The findings as lines, and what they amount to."""
    lines = []
    for status, topic, text, todo in findings:
        lines.append(f"{status:<5} {topic:<9} {text}")
        if todo:
            lines.append(f"{'':<15} -> {todo}")
    off = sum(finding.status == "off" for finding in findings)
    rest = f"; {off} thing{'s are' if off > 1 else ' is'} off" if off else ""
    if doctor.works(findings):
        return [*lines, f"deepzoo works here{rest}."]
    topics = dict.fromkeys(f.topic for f in findings if f.status == "fail")
    return [*lines, f"deepzoo does not work here: {', '.join(topics)}{rest}."]
