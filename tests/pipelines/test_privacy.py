import ipaddress
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.documents import to_table
from pipelines.filters import Batch
from pipelines.privacy import PrivacyRules

MARKS = PrivacyRules(email="<E>", ipv4="<4>", ipv6="<6>", phone_number="<P>")


def mask(*texts, rules=MARKS):
    applied = rules.apply(Batch(to_table([{"text": text} for text in texts])))
    assert applied.measures == []
    return (list(texts) if applied.text is None else applied.text.to_pylist()), dict(applied.counts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # e-mail addresses
        ("write to jane.doe+news@mail.example.co.uk.", "write to <E>."),
        ("<a_b@x-y.org>, 'o'brien@example.com'", "<<E>>, '<E>'"),
        ("mailto:ANN@EXAMPLE.COM?subject=x", "mailto:<E>?subject=x"),
        ("邮箱abc@例.com abc@example.cn。", "邮箱abc@例.com <E>。"),
        ("first@example.com,second@example.org", "<E>,<E>"),
        ("x@y", "x@y"),
        ("@example.com user@ user@.com user@com.1", "@example.com user@ user@.com user@com.1"),
        ("icon@2x.png and left-pad@1.3.0", "icon@2x.png and left-pad@1.3.0"),
        ("q@k.transpose(1, 2) + a @ b.T", "q@k.transpose(1, 2) + a @ b.T"),
        ("a" * 80 + "@example.com", "a" * 80 + "@example.com"),
        # IP addresses
        ("from 8.8.8.8, 9.9.9.9:53 and http://93.184.215.14/x", "from <4>, <4>:53 and http://<4>/x"),
        ("[1.2.3.4] 151.101.1.1-151.101.1.9.", "[<4>] <4>-151.101.1.9."),
        ("127.0.0.1 10.1.2.3 192.168.0.1 172.16.5.4 169.254.1.1 0.0.0.0 255.255.255.255 224.0.0.1 203.0.113.9",) * 2,
        ("1.2.3 1.2.3.4.5 1.2.3.256 01.2.3.4 1.2.3.4a x1.2.3.4 1.2.3.4-beta",) * 2,
        ("IP: 5.6.7.8, ssh root@5.6.7.8, 5.6.7.8:22 but 5.6.7.8", "IP: <4>, ssh root@<4>, <4>:22 but 5.6.7.8"),
        ("2018::11:18:43 2019:1:2:3:4:5:6:7 getty@tty1.service",) * 2,
        ("version 4.2.1.10, v1.2.3.4, Chrome/99.0.48.12, numpy==1.2.3.4, >=2.3.4.5, Section 8.1.1.3",) * 2,
        ("at 2606:4700:4700::1111, [2a00:1450:4001:81b:0:0:0:200e]:443.", "at <6>, [<6>]:443."),
        ("2001:db8::1 fe80::1 ::1 fd00::7 ff02::1 std::vector abc::def 12:30:45 2::3::4",) * 2,
        ("00:1b:63:84:45:e6 u8::MAX 20:15 a:b:c:d:e:f:g:h",) * 2,
        # telephone numbers
        ("call +49 30 1234567 or +44 (0)20 7946 0958.", "call <P> or <P>."),
        ("+1 (212) 555-2368, +12125552368; +33.1.42.68.53.00", "<P>, <P>; <P>"),
        ("tel:+4930123456", "tel:<P>"),
        ("(212) 555-2368 212-555-2368, 212.555.2368, 1-800-555-2368", "<P> <P>, <P>, <P>"),
        ("212 555 2368, 2125552368, 112-555-2368, 911-555-2368, 212-155-2368",) * 2,
        ("1212-555-23689 212-555-2368-1 A212-555-2368 978-0-306-40615-7 2024-01-15 212-555.2368",) * 2,
        ("+12 + 34567890 +1 23 +100 200 300 C++11 +0049301234567 ++4930123456",) * 2,
        ("+1 212 555 2368 555 others", "<P> 555 others"),
        ("+49 30 1234567 99 1234567", "<P> 1234567"),
    ],
)
def test_what_is_personal_goes_and_what_only_looks_so_stays(before, after):
    assert mask(before)[0] == [after]


def test_batches_are_edited_document_by_document_and_counted():
    texts = ["plain", "a@example.com and 151.101.1.1", "", "é +49 30 1234567 世", "b@example.com"]
    masked, counts = mask(*texts)
    assert masked == ["plain", "<E> and <4>", "", "é <P> 世", "<E>"]
    assert counts == {"privacy: e-mail address": 2, "privacy: IP address": 1, "privacy: telephone number": 1}


def test_a_slice_of_a_table_is_read_where_it_lies():
    table = to_table([{"text": text} for text in ("x@example.com", "151.101.1.1", "c@example.com")]).slice(1, 1)
    assert MARKS.apply(Batch(table)).text.to_pylist() == ["<4>"]


def test_each_kind_can_be_switched_off():
    text = "a@example.com 151.101.1.1 2606:4700:4700::1111 +49 30 1234567, 212-555-2368"
    off = PrivacyRules(emails=False, ip_addresses=False, phone_numbers=False)
    assert off.apply(Batch(to_table([{"text": text}]))).text is None
    with pytest.raises(ValueError, match="set enabled to false"):
        off.validate()
    for name, rest in (
        ("emails", "a@example.com <4> <6> <P>, <P>"),
        ("ip_addresses", "<E> 151.101.1.1 2606:4700:4700::1111 <P>, <P>"),
        ("phone_numbers", "<E> <4> <6> +49 30 1234567, 212-555-2368"),
    ):
        rules = PrivacyRules(**{**vars(MARKS), name: False})
        assert mask(text, rules=rules)[0] == [rest]


def test_masking_what_was_masked_changes_nothing():
    text = "a@example.com 151.101.1.1 2606:4700:4700::1111 +49 30 1234567, 212-555-2368"
    (once,), _ = mask(text, rules=PrivacyRules())
    assert once == "email@example.com 192.0.2.1 2001:db8::1 555-0100, 555-0100"
    assert mask(once, rules=PrivacyRules()) == ([once], {})


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text(st.sampled_from("a.@1+:( )-5é\n2/"), max_size=60), max_size=6))
def test_any_text_stays_but_for_what_is_replaced(texts):
    masked, counts = mask(*texts)
    assert sum(counts.values()) == sum(text.count("<") for text in masked)
    assert len(masked) == len(texts)
    for before, after in zip(texts, masked, strict=True):
        pattern = ".+".join(re.escape(piece) for piece in re.split("<[E46P]>", after))
        assert re.fullmatch(pattern, before, re.DOTALL)


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_addresses_that_are_public_are_those_of_the_standard_library(address):
    masked = mask(f"from {address} on")[0] == ["from <4> on"]
    assert masked == (address.is_global and not address.is_multicast)


@settings(deadline=None)
@given(st.ip_addresses(v=6, network=ipaddress.IPv6Network("2a00::/11")))
def test_every_spelling_of_a_public_ipv6_address_is_found(address):
    for spelling in {str(address), address.exploded, str(address).upper()}:
        assert (mask(f"from {spelling}, on")[0] == ["from <6>, on"]) == address.is_global


@settings(deadline=None)
@given(
    st.text(string.ascii_letters + string.digits + "._%+-", min_size=1, max_size=30).filter(
        lambda s: s[0].isalnum() and s[-1].isalnum()
    ),
    st.lists(st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from(["com", "de", "museum", "xn--p1ai"]),
)
def test_every_plain_address_is_found(local, labels, top):
    assert mask(f"to {local}@{'.'.join([*labels, top])}, now")[0] == ["to <E>, now"]
