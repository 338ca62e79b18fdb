"""The store of the launcher's rendezvous, and the exchange of all ranks' members in it."""

import json
import os
import time
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed

from fastdynat.distributed.members import Member
from fastdynat.errors import ToldElsewhere, UserError
from fastdynat.launch import place_of

Store: TypeAlias = Any  # torch declares its stores without types
_torch: Any = torch.distributed
POLL = 0.05  # seconds between looks at the store
FAILURE = "failure"


def open_store(rank: int, limit: timedelta) -> Store:
    """A connection to the store at MASTER_ADDR:MASTER_PORT, with a key prefix for this restart.

    Under torchrun the agent serves the store, otherwise rank 0.

    Raises:
        UserError: no store answers within `limit`.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = _torch.TCPStore(
            host,
            int(port),
            is_master=rank == 0 and not agent,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{place_of(rank)} found no rendezvous at {host}:{port} within {_minutes(limit)}: {reason}"
        ) from None
    # The agent's store outlives the processes that it restarts.
    return below(f"fastdynat-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def below(prefix: str, store: Store) -> Store:
    """A view of `store` in which every key starts with `prefix`."""
    return _torch.PrefixStore(prefix, store)


def find_each_other(store: Store, me: Member, size: int, limit: timedelta) -> tuple[str, list[Member]]:
    """A unique name for this world, and its members by rank.

    The store may hold entries of an earlier attempt. Rank 0 therefore lists the processes that it sees, each
    process confirms the list that names it, and rank 0 starts the world once all have confirmed the same
    list.

    Raises:
        UserError: a rank did not join within `limit`; on the lowest rank that did.
        ToldElsewhere: the same on the other ranks, or another rank has failed.
    """
    mine, until = me.to_json(), time.monotonic() + limit.total_seconds()
    store.set(f"here/{me.rank}", mine)
    listed = ""
    while True:
        if me.rank == 0:
            listed = _list_members(store, size, listed)
        confirmed = _confirm(store, me.rank, mine)
        if confirmed and _started(store, me.rank, size, confirmed):
            name, *texts = json.loads(confirmed)
            return name, [Member(**json.loads(text)) for text in texts]
        if store.check([FAILURE]):
            raise ToldElsewhere("another rank has failed")
        if time.monotonic() > until:
            raise _not_all_came(store, me.rank, size, limit)
        time.sleep(POLL)


def _list_members(store: Store, size: int, listed: str) -> str:
    """Publish the list of members if it is complete and has changed; only rank 0 calls this."""
    keys = [f"here/{rank}" for rank in range(size)]
    if not store.check(keys):
        return listed
    texts = [text.decode() for text in store.multi_get(keys)]
    if listed and json.loads(listed)[1:] == texts:
        return listed
    listed = json.dumps([os.urandom(8).hex(), *texts])
    store.set("list", listed)
    return listed


def _confirm(store: Store, rank: int, mine: str) -> str:
    """Confirm the published list and return it; "" if there is none or it does not name this process."""
    if not store.check(["list"]):
        return ""
    listed: str = store.get("list").decode()
    if json.loads(listed)[1 + rank : 2 + rank] != [mine]:
        return ""
    store.set(f"confirmed/{rank}", json.loads(listed)[0])
    return listed


def _started(store: Store, rank: int, size: int, listed: str) -> bool:
    """True once rank 0 has seen that all ranks have confirmed `listed`."""
    name = json.loads(listed)[0].encode()
    if rank > 0:
        return store.check(["started"]) and store.get("started") == name
    keys = [f"confirmed/{other}" for other in range(size)]
    done = store.check(keys) and all(value == name for value in store.multi_get(keys))
    if done:
        store.set("started", name.decode())
    return done


def _not_all_came(store: Store, rank: int, size: int, limit: timedelta) -> UserError:
    came = [other for other in range(size) if store.check([f"here/{other}"])]
    missing = [str(other) for other in range(size) if other not in came]
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}" if missing else "another rank"
    text = f"{who} of {size} did not join the rendezvous within {_minutes(limit)}"
    if came[0] != rank:
        return ToldElsewhere(text)
    return UserError(f"{text} (--rank-timeout); check that torchrun was started on all machines")


def _minutes(limit: timedelta) -> str:
    return f"{limit.total_seconds() / 60:g} minutes"
