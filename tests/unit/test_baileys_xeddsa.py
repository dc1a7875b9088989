"""XEdDSA against what libsignal itself signs.

The vectors were made with the packages that baileys 7.0.0-rc14 installs, curve25519-js 0.0.4 and libsignal 6.0.0:

    const curveJs = require('curve25519-js'), curve = require('libsignal/src/curve.js')
    public = curveJs.generateKeyPair(private).public
    message = 0x05 || another public key         (the last one is "free text")
    signature = curveJs.sign(private, message, random)
    baileys_signature = curve.calculateSignature(private, message)    as Baileys' signedKeyPair() does: no random

private and random are sha256 of labels. The first public key has its Edwards sign bit set, the others have not.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsctl.baileys.xeddsa import edwards_public, sign, verify


@dataclass(frozen=True, slots=True)
class Vector:
    """Hexadecimal, as Node printed it."""

    private: str
    public: str
    message: str
    random: str
    signature: str
    baileys_signature: str


VECTORS = [
    Vector(
        private="c5d69e8025e4403ac9e28f67ca69d419a3253fbe19c768e8dba4943dfeedfb99",
        public="9859a955e0d234034bc493c72b7c8bc84a285f4cf18bfbc60dddb2ba9f45a113",
        message="0535a44fec2a321c8fc939c404d00145ade266f98463a5e467eeb86c44e5be892f",
        random=(
            "d1c57678e3eac756b60a2c75f928d3d8239d61e708cd2cd625b7309ab92ad46a15e3e080043bb9f78600cfa38a61105d"
            "fe32450616ef78102406b88fa360f8f5"
        ),
        signature=(
            "42ce604ab86511fd749b4d6670f82fda360c77538d6057f4ac1c44f9d4dc9b26af290c60a00a611fa12106985fa65db9"
            "d9bef5df40e734e8e34c3ff09c48ea83"
        ),
        baileys_signature=(
            "863bb5bab4768eb363c58c14347cb172dbfb59ec3280546de33b9aada844d335503926c7355f3952512b46a4590cd3f8"
            "c4c405b6346b834ddd54fdb7266ef88b"
        ),
    ),
    Vector(
        private="9ccf034ce85ca94c4564b9e713bcfab43f408b8b76308a10b8ff6a4dd7a0c6fa",
        public="b2d0edd71fc4e7658996d8b99a5616346eaca4c286234806de50079b0968922b",
        message="0572ba8dc79d0ef716119fe5bbfdbc73168232295018ee9f38b46ade8edd495566",
        random=(
            "f24e1f8dd9493f6a0df0007342ba4bf5c0d9e10524ec84832ad306e836b04fa18f889e6fc41415853255c458636691bd"
            "ca4f7c8f0cb5a6253deba7402e2b9c00"
        ),
        signature=(
            "69e82d01ceb11a3dc13f8f73f71a344fd2680e27ba46882ca1a573ae52c8c7a666843f846d03c0039eb8f1dc13649e05"
            "7f42f8718d685757bf026a196b82a40d"
        ),
        baileys_signature=(
            "6070ec55bfd7a3a3d665f3723a2551ee877af8969c2364908a675f83931b66360fd1d66e0c62e78d827a5894e5754ef7"
            "95db9c7e8aeccd3551f7c14d7b97540e"
        ),
    ),
    Vector(
        private="68c13a527e856be87bdb286fe613bb54a1a8a8482ea44b719c671e98403d440f",
        public="4c1c51a9fe9c7474162fa16ce795b56bc25c4adce4bae0768979f41068b58678",
        message="667265652074657874",
        random=(
            "7dc9d17199c761b25e590c492123e076fed84c49a62f0678e582534aa78d29e4dcd26d42ab4a5c1dd7238fae41e1d2c2"
            "dfd7525985802da5fa6b01ddeb6a9c43"
        ),
        signature=(
            "d7e0f6547d7c14300b1934a7310cf9ad12bf18f94d7e999ceb0a2af5f45125792e5fc6fd5f097636651770c84384b844"
            "53886f01bcf2045492a6c8b618dbd00e"
        ),
        baileys_signature=(
            "ded1373e9362a72445c422e27d73a9e6d23148f602d265293963339bdf66ab032db97644eea73c82b858d84eb1ae8d84"
            "671613fcd440c032d17966e4850aa506"
        ),
    ),
]


@pytest.fixture(params=VECTORS, ids=["sign-bit-1", "sign-bit-0", "free-text"])
def vector(request: pytest.FixtureRequest) -> Vector:
    chosen: Vector = request.param
    return chosen


def test_signs_byte_for_byte_as_libsignal(vector: Vector) -> None:
    made = sign(bytes.fromhex(vector.private), bytes.fromhex(vector.message), bytes.fromhex(vector.random))
    assert made.hex() == vector.signature


def test_accepts_what_libsignal_signed(vector: Vector) -> None:
    public, message = bytes.fromhex(vector.public), bytes.fromhex(vector.message)
    for signature in (vector.signature, vector.baileys_signature):
        assert verify(public, message, bytes.fromhex(signature))
        assert verify(b"\x05" + public, message, bytes.fromhex(signature))


@given(st.integers(0, 511), st.integers(0, 1))
def test_any_flipped_bit_of_a_signature_is_refused(bit: int, which: int) -> None:
    vector = VECTORS[which]
    signature = bytearray.fromhex(vector.signature)
    signature[bit // 8] ^= 1 << bit % 8
    assert not verify(bytes.fromhex(vector.public), bytes.fromhex(vector.message), bytes(signature))


def test_another_message_or_key_is_refused() -> None:
    one, other = VECTORS[:2]
    signature = bytes.fromhex(one.signature)
    assert not verify(bytes.fromhex(one.public), bytes.fromhex(other.message), signature)
    assert not verify(bytes.fromhex(other.public), bytes.fromhex(one.message), signature)


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_bytes_that_are_no_key_or_no_signature_are_refused_without_an_exception(
    public: bytes, signature: bytes
) -> None:
    assert not verify(public, b"message", signature)


def test_minus_one_has_no_edwards_point() -> None:
    minus_one = (2**255 - 20).to_bytes(32, "little")
    assert edwards_public(minus_one) is None
    assert not verify(minus_one, b"message", bytes(64))


@pytest.mark.parametrize(("private", "random"), [(bytes(31), bytes(64)), (bytes(32), bytes(63))])
def test_sign_wants_exact_lengths(private: bytes, random: bytes) -> None:
    with pytest.raises(ValueError, match="bytes"):
        sign(private, b"message", random)
