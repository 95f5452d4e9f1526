"""`salt`: what vLLM does with `cache_salt`."""

from __future__ import annotations

from kvkeep.sharing.policies.share_all import ShareAll


class ShareBySalt(ShareAll):
    """Pages are public at once among requests with equal salts, those without one included.

    Whoever knows a salt reads what was computed under it. The scope of a request is derived from
    its salts alone then; the front end sees to that.
    """

    by_scope = True
