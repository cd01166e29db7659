"""What manifests say of trainings of the whole model, in words."""

from ulbq.artifacts.manifest import QuantizedManifest


def losses(manifest: QuantizedManifest) -> dict[str, str]:
    """How each training of the whole model went, and the fit of a temperature."""
    rows: dict[str, str] = {}
    if (fitted := manifest.temperature) is not None:
        divergences = f"held-out divergence {fitted.start_error:.4f} to {fitted.end_error:.4f}"
        rows["temperature"] = f"logits times {fitted.factor:.4f}, {divergences}"
    if (after := manifest.end_to_end) is not None:
        text = f" on {after.data['name']}" if after.data else ""
        told = f"held-out loss {after.start_error:.4f} to {after.end_error:.4f}"
        rows["end to end"] = f"{after.loss}{text}, {told} in epoch {after.epochs}"
    if (learnt := manifest.finetune) is not None:
        of = f"{learnt.data.get('samples'):,} samples of {', '.join(learnt.data.get('sources', ()))}"
        told = f"held-out loss {learnt.start_loss:.4f} to {learnt.end_loss:.4f}"
        rows["fine-tuned"] = f"{learnt.task}, {learnt.train}, on {of}, layout {learnt.template or 'plain text'}; {told}"
    return rows
