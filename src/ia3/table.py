"""Thousands of adapters of one base model, registered from disk and used by name in batches that mix them.

A registered adapter has no parameters and is never active. Its numbers stay in host memory as its file has them; the
device holds those that batches used last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ia3.adapter import device_at, hold_heads, hold_sites, release_heads, release_sites
from ia3.factory import become_adapted
from ia3.layers import is_inside
from ia3.mixing import unknown_names
from ia3.peft_model import PeftModel
from ia3.registered import Form, Heads, form_of, holds_modules, numbers_of, read_folder
from ia3.rows import BASE
from ia3.sites import Layout, Site
from ia3.stacked import Skeleton
from ia3.state import Attached, attached, carry, find_attached

# How many names a printed table shows.
_FEW = 8


@dataclass(frozen=True, eq=False)
class _Registered:
    """An adapter in host memory. Nothing changes it.

    Args:
        digest: of its content.
        form: what it holds.
        numbers: its vectors, `[D of its form]` in the file's order.
        heads: the modules that it trains in full, by path their tensors by name.
    """

    digest: str
    form: Form
    numbers: Tensor
    heads: Heads


class AdapterTable:
    """Adapters of one base model by the thousand: registered from disk, used by name, without attaching them.

    A bare model becomes a `PeftModel` without adapters, which computes exactly what the base computes; its `forward`
    and `generate` then take `adapter_names`. Attached adapters and the table's may share a batch.

    All adapters stay in host memory in fp32, each in a buffer of its own, so that growing copies nothing and `drop`
    gives the memory back. The device holds `capacity` of them over the union of their sites, absent = 1, and the one
    that was used longest ago makes room. They are fp32 there too, as attached vectors are: a site casts them to its
    activation, whose precision differs from layer to layer (autocast, T5's `wo`), so both ways give the same numbers.

    Classifiers' heads, which are trained in full, are rows as well: those of a batch are stacked and run in one call,
    each example's by its own. Adapters may differ in their number of classes, whatever the model's head has; of an
    example with fewer than the batch's widest the logits behind its own are minus infinity.

    Any number of threads may register, drop and run batches. A batch gathers its own copy of the numbers at its
    beginning, so nothing that happens later changes it.

    Args:
        model: the base model, bare or with adapters.
        capacity: the most adapters that one batch may use. Their memory on the device is allocated by the first
            batch: `capacity + 1` rows, for mt0-large 1.1 MB each.

    Raises:
        ValueError: the model has a table, was compiled, or has adapters from `inject_adapter_in_model`.

    Example:
        >>> table = AdapterTable(model)
        >>> table.register("news", "adapters/news")
        >>> model(**batch, adapter_names=["news", "__base__"])
    """

    def __init__(self, model: nn.Module, *, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(
                f"capacity is {capacity}: expected the number of adapters that a batch may use, 1 or more."
            )
        state = _state_for_table(model)
        self.capacity = capacity
        self.layout = Layout(())
        """The union of the registered adapters' sites, in the order of their coming; it only grows."""
        self.lock = threading.RLock()
        """Held while a batch gathers its rows and while the table changes, never while a file is read or checked."""
        # Held while a file is compared with the model's modules and while these change: registrations wait, no batch.
        self._forming = threading.RLock()
        self.skeletons: dict[str, Skeleton] = {}
        """The modules that any of the registered adapters trains in full, by path; it only grows."""
        self._model = model
        self._registered: dict[str, _Registered] = {}
        self._forms: dict[bytes, Form] = {}
        self._starts: dict[Site, int] = {}
        self._open = True
        self._gathered: torch.cuda.Event | None = None
        self._forget_device()
        state.table = self
        carry(model, state)
        if not isinstance(model, PeftModel):
            become_adapted(model, PeftModel)

    # Registering

    def register(self, name: str, path: str | Path) -> str:
        """Read an adapter from its folder, under a new name or in the place of another content.

        Args:
            name: its name in `adapter_names`.
            path: the folder that `save_pretrained` wrote, with `adapter_config.json` and the vectors.

        Returns:
            The content's digest. The same content under the same name changes nothing.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: a bad name or that of an attached adapter, modules trained in full that are no classifier's
                head, a closed table, or what `PeftModel.from_pretrained` raises. The table is then unchanged.
        """
        self._check_name(name)
        saved = read_folder(self._model, Path(path))
        held = self._registered.get(name)
        if held is not None and held.digest == saved.digest:
            return saved.digest
        form = self._forms.get(saved.about)
        if form is None or form.size != len(saved.content.data):
            with self._forming:
                form = form_of(self._model, saved)
            self._forms[saved.about] = form
        adapter = _Registered(saved.digest, form, *numbers_of(self._model, form, saved))
        with self._forming, self.lock:
            self._check_name(name)
            self._take_place(form)
            former = self._registered.get(name)
            self._registered[name] = adapter
            if former is not None:
                self._leave_slot(former)
        return saved.digest

    def drop(self, name: str) -> None:
        """Forget an adapter; batches under way go on with it.

        Raises:
            ValueError: there is none of that name.
        """
        with self.lock:
            if name not in self._registered:
                raise unknown_names([name], self._registered)
            self._leave_slot(self._registered.pop(name))

    def classes(self, name: str) -> int | None:
        """How many classes an adapter's head chooses from; None where it has vectors alone.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._registered:
            raise unknown_names([name], self._registered)
        return self._registered[name].form.classes

    def close(self) -> None:
        """Forget all adapters and take the table off the model; one without attached adapters is the bare base again.

        No batch may be under way. `model.unload()` does the same.
        """
        if not self._open:
            return
        if attached(self._model).adapters:
            self.leave()
        else:
            self._model.unload()  # type: ignore[operator]

    @property
    def resident(self) -> int:
        """How many adapters' numbers the device holds."""
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._registered

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._registered))

    def __len__(self) -> int:
        return len(self._registered)

    def __repr__(self) -> str:
        if not self._open:
            return "AdapterTable(closed)"
        names = list(self._registered)
        where = self._rows.device if self._rows is not None else next(self._model.parameters()).device
        shown = ", ".join([repr(name) for name in names[:_FEW]] + ["…"] * (len(names) > _FEW))
        base = getattr(self._model, "name_or_path", "")
        return (
            f"AdapterTable({type(self._model).__name__}{f' {base!r}' if base else ''}, {len(names)} adapters over "
            f"{self.layout.size:,} numbers, float32, up to {self.capacity} on {where}{f': {shown}' if shown else ''})"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("A model with an AdapterTable can't be copied or pickled: close() the table before.")

    # For the model

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """Where a registered adapter has vectors; the lock must be held."""
        return self._registered[name].form.sites

    def gather(self, names: Sequence[str]) -> Tensor:
        """The rows of these names, a copy `[len(names), D]` in fp32 on the model's device; the lock must be held.

        Args:
            names: registered ones and `"__base__"`.

        Raises:
            ValueError: more different adapters than the table's capacity.
        """
        wanted = {name: self._registered[name] for name in names if name != BASE}
        if len(wanted) > self.capacity:
            raise ValueError(
                f"This batch uses {len(wanted)} adapters of the table, whose capacity is {self.capacity}: pass smaller "
                f"batches, or make it AdapterTable(model, capacity={len(wanted)})."
            )
        device = device_at(self._model, self.layout.sites[0])
        self._wait(device)
        rows = self._rows_on(device)
        for adapter in wanted.values():
            if adapter in self._slots:
                self._slots.move_to_end(adapter)
        for adapter in wanted.values():
            if adapter not in self._slots:
                self._fill_slot(rows, adapter)
        numbers = [0 if name == BASE else self._slots[wanted[name]] for name in names]
        gathered = rows.index_select(0, torch.tensor(numbers, device=device))
        self._note(device, [rows])
        return gathered

    def gather_heads(self, names: Sequence[str]) -> dict[str, Heads]:
        """By name what each of these adapters trains in full, on the model's device; the lock must be held.

        The device holds those of as many adapters as the capacity says.

        Args:
            names: registered ones, each once.
        """
        wanted = {name: self._registered[name] for name in names}
        device = device_at(self._model, self.layout.sites[0])
        self._wait(device)
        for adapter in wanted.values():
            held = self._heads.pop(adapter, None)
            if held is None or any(each.device != device for head in held.values() for each in head.values()):
                held = {
                    path: {name: tensor.to(device) for name, tensor in head.items()}
                    for path, head in adapter.heads.items()
                }
            self._heads[adapter] = held
            while len(self._heads) > self.capacity:
                self._heads.popitem(last=False)
        found = {name: self._heads[adapter] for name, adapter in wanted.items()}
        self._note(device, [each for heads in found.values() for head in heads.values() for each in head.values()])
        return found

    def _wait(self, device: torch.device) -> None:
        """Let no slot be filled, on whichever stream, before the last batch has read it."""
        if self._gathered is not None:
            torch.cuda.current_stream(device).wait_event(self._gathered)

    def _note(self, device: torch.device, read: Iterable[Tensor]) -> None:
        """Remember until when the current stream reads what is held."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            for tensor in read:
                tensor.record_stream(stream)
            self._gathered = stream.record_event()

    def leave(self) -> None:
        """Take the table off the model, whose class stays as it is: what `close` and `unload` share."""
        with self._forming, self.lock:
            self._open = False
            release_heads(self._model, self.skeletons)
            self.skeletons.clear()
            release_sites(self._model, self.layout.sites)
            self._registered.clear()
            self._forms.clear()
            self._forget_device()

    # Inside: what is read

    def _check_name(self, name: str) -> None:
        if not self._open:
            raise ValueError("This AdapterTable is closed: make a new one, AdapterTable(model).")
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"{name!r} can't name an adapter: expected a non-empty string, not {BASE!r}.")
        if name in attached(self._model).adapters:
            raise ValueError(
                f"The model carries an attached adapter {name!r}: register under another name, or "
                f"delete_adapter({name!r}) first."
            )

    # Inside: where it is held

    def _take_place(self, form: Form) -> None:
        """Give the form's sites their columns and the model its hooks and heads, where they are new."""
        heads = [path for path in form.heads if path not in self.skeletons]
        new = [site for site in form.sites if site not in self._starts]
        hidden = sorted(
            site.path
            for site in {*self._starts, *new}
            if any(is_inside(site.path, path) for path in (*self.skeletons, *heads))
        )
        if hidden:
            raise ValueError(
                f"One adapter trains {hidden[0]} in full and another has vectors there: they can't share a table."
            )
        if heads:
            self.skeletons.update(hold_heads(self._model, heads))
        if not new:
            return
        hold_sites(self._model, new)
        start = self.layout.size
        for site in new:
            self._starts[site] = start
            start += site.width
        self.layout = Layout((*self.layout.sites, *new))
        self._forget_device()

    def _forget_device(self) -> None:
        """Let the rows on the device go; the next batch makes new ones."""
        self._rows: Tensor | None = None
        self._slots: OrderedDict[_Registered, int] = OrderedDict()  # the one that was used last is last
        self._heads: OrderedDict[_Registered, Heads] = OrderedDict()
        self._free: list[int] = []

    def _rows_on(self, device: torch.device) -> Tensor:
        """Rows `[1 + capacity, D]` on the device, the first of them the base's."""
        if self._rows is None or self._rows.device != device:
            self._forget_device()
            with torch.inference_mode(False):
                self._rows = torch.ones(1 + self.capacity, self.layout.size, device=device)
            self._free = list(range(self.capacity, 0, -1))
        return self._rows

    def _fill_slot(self, rows: Tensor, adapter: _Registered) -> None:
        """Copy an adapter to the device, in the place of the one used longest ago where none is free."""
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        with torch.no_grad():
            rows[slot].copy_(self._spread(adapter))
        self._slots[adapter] = slot

    def _leave_slot(self, adapter: _Registered) -> None:
        self._heads.pop(adapter, None)
        slot = self._slots.pop(adapter, None)
        if slot is not None:
            self._free.append(slot)

    def _spread(self, adapter: _Registered) -> Tensor:
        """An adapter's numbers over the table's sites, `[D]`; an absent vector is one."""
        if adapter.form.sites == self.layout.sites:
            return adapter.numbers
        row = torch.ones(self.layout.size)
        for site, part in zip(adapter.form.sites, Layout(adapter.form.sites).split(adapter.numbers), strict=True):
            start = self._starts[site]
            row[start : start + site.width] = part
        return row


def read_vectors(model: nn.Module, path: str | Path) -> tuple[str, dict[Site, Tensor]]:
    """An adapter's vectors from its folder, checked as loading it checks them; the model stays as it is.

    Args:
        model: the base model, which may be without memory (on the device "meta").
        path: the folder that `save_pretrained` wrote.

    Returns:
        The content's digest, the one that `AdapterTable.register` gives, and a vector `[site.width]` in fp32 for each
        site. A fused projection's has all of its channels.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: modules trained in full, or what `PeftModel.from_pretrained` raises.
    """
    saved = read_folder(model, Path(path))
    form = form_of(model, saved)
    if form.heads:
        raise holds_modules(saved.folder, form.heads)
    numbers, _ = numbers_of(model, form, saved)
    return saved.digest, dict(zip(form.sites, Layout(form.sites).split(numbers), strict=True))


def _state_for_table(model: nn.Module) -> Attached:
    """What the model carries, for a table to join."""
    state = find_attached(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model was compiled: make the AdapterTable of the model that isn't.")
    if state is not None and not isinstance(model, PeftModel):
        raise ValueError(
            "The model carries adapters of inject_adapter_in_model, beside which adapter_names don't work: attach them "
            "with get_peft_model."
        )
    if state is not None and state.table is not None:
        raise ValueError("The model has an AdapterTable already: register in that one, or close() it first.")
    return state or Attached()
