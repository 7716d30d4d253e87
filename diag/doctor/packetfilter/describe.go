package packetfilter

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// String names a chain as nft does.
func (c Chain) String() string {
	return fmt.Sprintf("table %s %s, chain %s", c.Family, c.Table, c.Name)
}

// describeRule writes a rule much as nft would, in quotes.
func describeRule(c Chain, r Rule) string {
	var words []string
	family := "" // of the packets that the rule is about, where a test asks for it
	if c.Family == "ip" || c.Family == "ip6" {
		family = c.Family
	}
	for _, t := range r.Tests {
		if f := familyAsked(t); f != "" {
			family = f
		} else if t.Sets == "" {
			words = append(words, describe(t, family))
		}
	}
	action := strings.TrimSpace(string(r.Action.Verdict) + " " + r.Action.Chain)
	text := strings.Join(append(words, action), " ")
	if family != c.Family && !strings.Contains(text, "addr ") { // an address says it
		text = strings.TrimSpace(family + " " + text)
	}
	return fmt.Sprintf("%q", text)
}

// familyAsked is the family for which a test asks, "ip" or "ip6"; empty where it asks for something else.
func familyAsked(t Test) string {
	if len(t.Key) != 1 || t.Not || len(t.Any) != 1 || len(t.Any[0]) != 1 || t.Key[0].Mask != nil {
		return ""
	}
	switch f, v := t.Key[0].Field, string(t.Any[0][0].From); {
	case f == NFProto && v == string([]byte{unix.NFPROTO_IPV4}), f == EtherType && v == string(port16(unix.ETH_P_IP)):
		return "ip"
	case f == NFProto && v == string([]byte{unix.NFPROTO_IPV6}), f == EtherType && v == string(port16(unix.ETH_P_IPV6)):
		return "ip6"
	}
	return ""
}

// describe writes a test; family is that of the rule's packets.
func describe(t Test, family string) string {
	if t.What != "" {
		return t.What
	}
	var fields, values []string
	for _, k := range t.Key {
		switch field := string(k.Field); {
		case k.isAddress():
			fields = append(fields, strings.TrimSpace(family+" "+field))
		case k.Field != Protocol || t.Not: // "udp" says all
			fields = append(fields, field)
		}
	}
	if len(t.Key) == 1 && t.Key[0].Mask != nil && (t.Key[0].Field == State || t.Key[0].Field == Status) {
		return fields[0] + " " + bitNames(t)
	}
	const most = 3
	for i, alternative := range t.Any {
		if i == most {
			values = append(values, "...")
			break
		}
		var parts []string
		for j, r := range alternative {
			from := describeValue(t.Key[j], r.From, family)
			if !bytes.Equal(r.From, r.To) {
				from += "-" + describeValue(t.Key[j], r.To, family)
			}
			parts = append(parts, from)
		}
		values = append(values, strings.Join(parts, " . "))
	}
	not := " "
	if t.Not {
		not = " != "
	}
	return strings.TrimSpace(strings.Join(fields, " . ") + not + strings.Join(values, ","))
}

// bitNames are those of the bits under a mask; the test is that none of them is set, or not so.
func bitNames(t Test) string {
	var out []string
	bits := binary.NativeEndian.Uint32(append(bytes.Clone(t.Key[0].Mask), 0, 0, 0, 0))
	names := []string{"invalid", "established", "related", "new", 6: "untracked"}
	if t.Key[0].Field == Status {
		names = []string{"expected", "seen-reply", "assured", "confirmed", "snat", "dnat"}
	}
	for i, name := range names {
		if bits&(1<<i) != 0 && name != "" {
			out = append(out, name)
		}
	}
	if !t.Not {
		return "!= " + strings.Join(out, ",")
	}
	return strings.Join(out, ",")
}

func describeValue(k Key, b []byte, family string) string {
	switch {
	case k.isAddress():
		return describeAddress(k.Mask, b, family)
	case k.Field == In || k.Field == Out:
		name := string(bytes.TrimRight(b, "\x00"))
		if len(name) == len(b) { // the beginning of one
			return name + "*"
		}
		return name
	case (k.Field == Port || k.Field == SourcePort) && len(b) == 2:
		return fmt.Sprint(binary.BigEndian.Uint16(b))
	case k.Field == Protocol && len(b) == 1:
		names := map[byte]string{
			unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "ipv6-icmp",
		}
		return cmp.Or(names[b[0]], fmt.Sprintf("l4proto %d", b[0]))
	case len(b) == 4: // a number of the kernel, in the order of the machine
		return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(b))
	}
	return fmt.Sprintf("%#x", b)
}

// describeAddress writes an address, or the beginning of one, with the length of its prefix.
func describeAddress(mask, b []byte, family string) string {
	whole := make([]byte, 16)
	if len(b) <= 4 && family != "ip6" {
		whole = whole[:4]
	}
	copy(whole, b)
	a, _ := netip.AddrFromSlice(whole)
	ones := 8 * len(b)
	if mask != nil {
		var size int
		if ones, size = net.IPMask(mask).Size(); size == 0 {
			return fmt.Sprintf("%s/%s", a, net.IP(mask))
		}
	}
	if ones < a.BitLen() {
		return fmt.Sprintf("%s/%d", a, ones)
	}
	return a.String()
}
