"""XEdDSA: Ed25519 signatures under Curve25519 keys, as Signal makes and checks them.

WhatsApp accepts a signedPreKey only with the identity key's signature (docs/baileys.md section 5). Signal's variant
differs from the XEdDSA paper in one bit: the sign of the Edwards public key is not normalised away but travels in the
signature's otherwise empty top bit (curve25519-js, `curve25519_sign`, which libsignal 6.0.0 calls).

The curve arithmetic below is not constant-time: it signs keys that a drill has just invented, never a customer's.
"""

import hashlib
from typing import NamedTuple

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493  # order of the base point (RFC 8032 section 5.1)
_D = -121665 * pow(121666, -1, _P) % _P
_NONCE_PREFIX = b"\xfe" + b"\xff" * 31  # 2**256 - 2: "hash_1" of the XEdDSA paper, section 2.5
_SIGN_BIT = 0x80


class _Point(NamedTuple):
    """Extended Edwards coordinates: x = X/Z, y = Y/Z, xy = T/Z (RFC 8032 section 5.1.4)."""

    x: int
    y: int
    z: int
    t: int


_BASE = _Point(
    15112221349535400772501151409588531511454012693041857206046113283949847762202,
    46316835694926478169428394003475163141307993866256225615783033603165251855960,
    1,
    46827403850823179245072216630277197565144205554125654976674165829533817101731,
)
_NEUTRAL = _Point(0, 1, 1, 0)


def _add(p: _Point, q: _Point) -> _Point:
    """Sum of two points; complete, so it doubles too (RFC 8032 section 5.1.4)."""
    a = (p.y - p.x) * (q.y - q.x) % _P
    b = (p.y + p.x) * (q.y + q.x) % _P
    c = 2 * p.t * q.t * _D % _P
    d = 2 * p.z * q.z % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return _Point(e * f % _P, g * h % _P, f * g % _P, e * h % _P)


def _times_base(scalar: int) -> bytes:
    """Compressed scalar * B."""
    result, power = _NEUTRAL, _BASE
    while scalar:
        if scalar & 1:
            result = _add(result, power)
        power = _add(power, power)
        scalar >>= 1
    z_inverse = pow(result.z, -1, _P)
    x, y = result.x * z_inverse % _P, result.y * z_inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _hash_to_scalar(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little") % _L


def edwards_public(public: bytes) -> bytes | None:
    """The Edwards y of a 32-byte Montgomery public key, sign bit 0: (u-1)/(u+1). None for u = -1, which has none."""
    u = int.from_bytes(public, "little") & (2**255 - 1)  # RFC 7748 section 5: the top bit of u is ignored
    if (u + 1) % _P == 0:
        return None
    return ((u - 1) * pow(u + 1, -1, _P) % _P).to_bytes(32, "little")


def sign(private: bytes, message: bytes, random: bytes) -> bytes:
    """The 64-byte signature of `message` under a 32-byte Curve25519 private key; `random` is 64 fresh random bytes."""
    if len(private) != 32:
        raise ValueError(f"an XEdDSA private key has 32 bytes, not {len(private)}")
    if len(random) != 64:
        raise ValueError(f"XEdDSA wants 64 random bytes, not {len(random)}")
    clamped = bytes([private[0] & 248]) + private[1:31] + bytes([private[31] & 127 | 64])
    scalar = int.from_bytes(clamped, "little")
    public = _times_base(scalar)
    nonce = _hash_to_scalar(_NONCE_PREFIX, clamped, message, random)
    commitment = _times_base(nonce)
    response = (nonce + _hash_to_scalar(commitment, public, message) * scalar) % _L
    signature = bytearray(commitment + response.to_bytes(32, "little"))
    signature[63] |= public[31] & _SIGN_BIT
    return bytes(signature)


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the holder of a Curve25519 public key (32 bytes, or 33 with Signal's 0x05 in front) signed `message`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(public) == 33 and public[0] == 5:
        public = public[1:]
    if len(public) != 32 or len(signature) != 64:
        return False
    edwards = edwards_public(public)
    if edwards is None:
        return False
    signed_key = edwards[:31] + bytes([edwards[31] | signature[63] & _SIGN_BIT])
    plain = signature[:63] + bytes([signature[63] & ~_SIGN_BIT & 0xFF])
    try:
        Ed25519PublicKey.from_public_bytes(signed_key).verify(plain, message)
    except (InvalidSignature, ValueError):  # ValueError: the key is no point of the curve
        return False
    return True
