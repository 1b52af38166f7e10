"""Mutations of the core that the tests must notice: file, old text (found exactly once), new text, what breaks."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    breaks: str


MUTANTS = [
    Mutant(
        "hooks.py",
        "return product.view(self.view).to(activation.dtype)",
        "return product.view(self.view)",
        "half-precision activations become fp32",
    ),
    Mutant(
        "hooks.py",
        "            if self.sides[name] == side\n",
        "            if self.sides[name] != side\n",
        "vectors multiply the other side",
    ),
    Mutant(
        "hooks.py",
        'if name in self.__dict__.get("_parameters", ()):',
        "if False:",
        "a compiled graph keeps a parameter that was sharded or assigned anew",
    ),
    Mutant(
        "hooks.py",
        "ones = vector.new_ones(self.width)",
        "ones = vector.new_zeros(self.width)",
        "queries of fused projections vanish",
    ),
    Mutant(
        "hooks.py",
        "product = product * self._full(vector)",
        "product = self._full(vector)",
        "of several active adapters only the last acts",
    ),
    Mutant(
        "sites.py",
        'path == name or path.endswith(f".{name}")',
        "path.endswith(name)",
        "`o` also means `wo`",
    ),
    Mutant(
        "sites.py",
        "family is not None and (by_default or loading) else {}",
        "family is not None else {}",
        "explicit targets lose the query channels",
    ),
    Mutant(
        "sites.py",
        "return bool((vector.reshape(-1).cpu()[rest] == 1).all())",
        "return True",
        "a file's query vector is dropped in silence",
    ),
    Mutant(
        "families.py",
        "(3 * head + 1) * size",
        "(3 * head) * size",
        "GPT-NeoX and BLOOM train queries too",
    ),
    Mutant(
        "families.py",
        "(group + 1) * per_group - 2",
        "(group + 1) * per_group - 1",
        "Falcon trains values alone",
    ),
    Mutant(
        "merging.py",
        'scaled = bias.detach() * scales[path, "output"].to(bias.device)',
        "scaled = bias.detach()",
        "merging forgets the bias",
    ),
    Mutant(
        "merging.py",
        "if len(shared) > 1:",
        "if len(shared) > 2:",
        "merging a tied head scales the embedding",
    ),
    Mutant(
        "merging.py",
        "if not torch.isfinite(new).all():",
        "if False:",
        "NaN and overflow are merged into the weights",
    ),
    Mutant(
        "merging.py",
        "originals[name] = parameter.detach().cpu().clone()",
        "originals[name] = parameter.detach().cpu()",
        "unmerging puts the merged weights back",
    ),
    Mutant(
        "merging.py",
        "by_group = scale.view(module.groups, 1, -1).expand(-1, module.out_channels // module.groups, -1)",
        "by_group = scale.view(1, module.groups, -1).expand(module.out_channels // module.groups, -1, -1)",
        "grouped convolutions get another group's inputs",
    ),
    Mutant(
        "adapter.py",
        "multiplying = acting if state.originals is None else ()",
        "multiplying = acting",
        "a merged adapter acts twice",
    ),
    Mutant(
        "adapter.py",
        "acting = state.active if state.enabled else ()",
        "acting = state.active",
        "disable_adapter does nothing",
    ),
    Mutant(
        "adapter.py",
        "            require_grad(model, adapter, False)\n",
        "            require_grad(model, adapter, True)\n",
        "an adapter goes on training after another was activated",
    ),
    Mutant(
        "adapter.py",
        "        parameter.requires_grad_(False)\n    state.trained_before",
        "        pass\n    state.trained_before",
        "the base is not frozen",
    ),
    Mutant(
        "checkpoint.py",
        "    unknown = [key for key in tensors if key not in sites and key not in targets]\n",
        "    unknown: list[str] = []\n",
        "a file's unknown keys are dropped in silence",
    ),
    Mutant(
        "checkpoint.py",
        "    if tuple(tensor.shape) == expected:\n",
        "    if True:\n",
        "a vector of the wrong side is broadcast into place",
    ),
    Mutant(
        "checkpoint.py",
        'prefix = PREFIX if isinstance(model, Swapped) else ""',
        'prefix = ""',
        "PEFT's prefix is missing",
    ),
    Mutant(
        "arithmetic.py",
        "adapter[site] - 1 if site in adapter",
        "adapter[site] if site in adapter",
        "combining works on l instead of l - 1",
    ),
    Mutant(
        "config.py",
        "    if telling:\n",
        "    if False:\n",
        "a configuration's unknown field is ignored",
    ),
    Mutant(
        "files.py",
        "        temporary.replace(path)\n",
        "        path.write_bytes(content)\n",
        "a save is not atomic and leaves its temporary file",
    ),
    Mutant(
        "training/run.py",
        '    _restore_random_state(content["random"])\n',
        "",
        "a resumed run draws other dropout",
    ),
    Mutant(
        "training/run.py",
        '    optimizer.load_state_dict(content["optimizer"])\n',
        "",
        "a resumed run forgets the optimizer",
    ),
    Mutant(
        "training/optimise.py",
        "vector.add_(1 - vector, alpha=rate * weight_decay)",
        "vector.mul_(1 - rate * weight_decay)",
        "vectors decay to zero",
    ),
    Mutant(
        "training/loop.py",
        "part = part * (count / sum(targets))",
        "part = part / len(batches)",
        "accumulated batches count equally, whatever they hold",
    ),
    Mutant(
        "training/loop.py",
        "progress.best is None or self.rank(evaluation) > self.rank(",
        "progress.best is None or self.rank(evaluation) < self.rank(",
        "the worst adapter is kept as the best",
    ),
    Mutant(
        "training/collate.py",
        "drawn += own * rounds + chance.sample(own, rest)",
        "drawn += own",
        "balanced epochs are not",
    ),
    Mutant(
        "training/losses.py",
        "unlikelihood=-_mean(_log_complements(logits, choices), present & ~right)",
        "unlikelihood=-_mean(_log_complements(logits, choices), present)",
        "the right choice is made unlikely too",
    ),
    Mutant(
        "fast/operations.py",
        "return scaled(_attend(scaled(q, l_k, spans), spans, k, v, spans, bias, heads, p), l_v, spans)",
        "return scaled(_attend(q, spans, k, v, spans, bias, heads, p), l_v, spans)",
        "the fast step forgets the keys' vectors",
    ),
    Mutant(
        "fast/t5.py",
        'scale = self.config.d_model**-0.5 if getattr(self.config, "scale_decoder_outputs", False) else 1.0',
        "scale = 1.0",
        "the fast step doesn't scale a tied head",
    ),
    Mutant(
        "fast/step.py",
        "        if not self.loss.guard.is_valid():\n",
        "        if False:\n",
        "a model that was cast trains on its old weights",
    ),
    Mutant(
        "fast/output.py",
        "unflatten_dense_tensors(flat * grad, ctx.vectors)",
        "unflatten_dense_tensors(flat, ctx.vectors)",
        "a loss over the number of accumulated batches has the whole gradient",
    ),
    Mutant(
        "fast/output.py",
        "    if not count or state.steps_aside(",
        "    if state.steps_aside(",
        "a batch without labels has the loss 0 instead of the model's NaN",
    ),
    Mutant(
        "fast/output.py",
        "        found = found * count / items\n",
        "        pass\n",
        "a Trainer's accumulated batches count by their number, not their tokens",
    ),
    Mutant(
        "fast/output.py",
        "        return self.loss if self.guard.in_one_mode else None\n",
        "        return self.loss\n",
        "a decoder in evaluation mode drops",
    ),
    Mutant(
        "fast/guard.py",
        "            [list(map(of, modules)) for of, modules in self.settings],\n",
        "",
        "a dropout that was changed goes on with its old rate",
    ),
    Mutant(
        "fast/products.py",
        "round_rows(grad.contiguous(), product.scales)",
        "round_rows(grad.contiguous())",
        "gradients through fp8 forget the scales of the weights",
    ),
    Mutant(
        "storage.py",
        "        weight.data = weight.data.clone()\n",
        "        pass\n",
        "unloading leaves the weights next to each other",
    ),
    Mutant(
        "rows.py",
        "vectors.repeat_interleave(count, dim=0)",
        "vectors.repeat(count, 1)",
        "beams and samples get other examples' adapters",
    ),
    Mutant(
        "rows.py",
        "        if changed:\n            swap_rows(former)\n",
        "        pass\n",
        "a mixed batch's rows go on acting after it",
    ),
    Mutant(
        "fast/packing.py",
        "    if bool((pieces > 1).any()):\n",
        "    if False:\n",
        "a mask with holes is packed as if it had none",
    ),
    Mutant(
        "fast/t5.py",
        "bias = self._positions(stack, most).index_select(2, position)",
        "bias = self._positions(stack, most)[:, :, :1]",
        "each token that is written sees the first one's positions",
    ),
    Mutant(
        "fast/t5.py",
        "    twice = _adapted_twice(sites)\n",
        "    twice = None\n",
        "of two vectors of one intermediate one is forgotten",
    ),
    Mutant(
        "fast/llama.py",
        "following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        "following = labels",
        "a token predicts itself",
    ),
    Mutant(
        "fast/sweep.py",
        "        self.table.add_((1 - self.table) * (rates * self.decays))\n",
        "        self.table.sub_(self.table * (rates * self.decays))\n",
        "the vectors of a sweep decay to zero",
    ),
    Mutant(
        "fast/sweep.py",
        "        self.counts.add_(learning)\n",
        "        self.counts.add_(1)\n",
        "a run without examples ages",
    ),
    Mutant(
        "table.py",
        "        if held is not None and held.digest == digest:\n",
        "        if held is not None:\n",
        "another content under a name is not taken",
    ),
]
