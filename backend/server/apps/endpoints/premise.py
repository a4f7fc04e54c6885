"""What an answer rests on, as this process remembers it, and the SQL by which the database says whether it holds."""

from __future__ import annotations

from typing import NamedTuple

# Part of the statement that records the answer, which runs after the request came: nothing that was acknowledged
# before can be missed. The parameters are those of `values`.
HOLDS = """
    EXISTS (
        SELECT 1 FROM knox_authtoken JOIN auth_user ON auth_user.id = knox_authtoken.user_id
        WHERE digest = %s AND is_active AND (expiry IS NULL OR expiry > %s)
    )
    AND EXISTS (SELECT 1 FROM endpoints_endpoint WHERE id = %s AND name = %s)
    AND (SELECT max(id) FROM endpoints_mlalgorithmstatus WHERE parent_endpoint_id = %s) = %s
"""


class Premise(NamedTuple):
    """The caller's token is good, and nothing has happened to the endpoint's algorithms since `newest_step`."""

    token_digest: str
    endpoint_id: int
    endpoint_name: str
    newest_step: int

    def values(self, now: object) -> list[object]:
        """The parameters of HOLDS. now: a moment as the database takes it."""
        endpoint_id = self.endpoint_id
        return [self.token_digest, now, endpoint_id, self.endpoint_name, endpoint_id, self.newest_step]
