"""``rollflow audit``: is the log whole, and do the weights follow from it?"""

from rich.console import Console
from rich.text import Text

from rollflow.storage.audit import audit_run
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.runs import open_run


def audit_stored(url: str, name: str, console: Console) -> int:
    """Verify everything that the store holds of a run; print and count what is wrong."""
    store = Store(StoreConfig(url=url))
    report = audit_run(store, open_run(store, name))
    counts = ", ".join(f"{n} {kind}" for kind, n in report.counts.items())
    console.print(f"{name}: {counts} verified")
    for leftover in report.leftovers:
        console.print(f"  left over, harmless: {leftover.url} ({leftover.reason})")
    for finding in report.findings:
        console.print(Text(f"  wrong: {finding.name}: {finding.reason}", style="red"))
    console.print(f"{len(report.findings)} finding{'' if len(report.findings) == 1 else 's'}")
    return len(report.findings)


async def recompute_stored(url: str, name: str, console: Console) -> int:
    """Train the run again from its log; print and count the weights that came out different."""
    from .replay import recompute  # engines and Prefect, which the command without it never needs

    differences = (await recompute(StoreConfig(url=url), name)).differences
    for difference in differences:
        console.print(Text(f"  different: {difference}", style="red"))
    console.print(f"recomputed from the log: {len(differences)} differences")
    return len(differences)
