package netstate

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// The extensions of iptables carry C structures, which are the same in iptables-nft and in iptables-legacy
// (uapi/linux/netfilter/xt_*.h).

// xtMatch turns an extension's condition into tests. One that is not known here is a test that can't be judged.
func xtMatch(name string, rev uint32, info []byte) []FilterTest {
	switch {
	case name == "comment":
		return nil
	case (name == "udp" || name == "tcp") && len(info) >= 8:
		return xtPorts(name, info)
	case name == "multiport" && rev == 1 && len(info) >= 48:
		return xtMultiport(info)
	case name == "state" && len(info) >= 4:
		return []FilterTest{bitTest(FieldState, u32(info), false)}
	case name == "conntrack" && rev >= 1 && len(info) >= 154:
		return xtConntrack(rev, info)
	case name == "mark" && rev == 1 && len(info) >= 9: // struct xt_mark_mtinfo1
		value := binary.NativeEndian.AppendUint32(nil, u32(info))
		return []FilterTest{fieldTest(FieldMark, bytes.Clone(info[4:8]), value, value, info[8] != 0)}
	case name == "addrtype" && rev == 1 && len(info) >= 8: // struct xt_addrtype_info_v1
		return xtAddrtype(info)
	}
	return []FilterTest{unknownTest("-m " + name)}
}

// xtPorts is struct xt_udp; struct xt_tcp begins like it.
func xtPorts(name string, info []byte) []FilterTest {
	port := func(at int) []byte { return binary.BigEndian.AppendUint16(nil, binary.NativeEndian.Uint16(info[at:])) }
	proto, invert := byte(unix.IPPROTO_UDP), byte(0)
	if name == "udp" && len(info) > 8 {
		invert = info[8]
	}
	var more []FilterTest
	if name == "tcp" {
		proto = unix.IPPROTO_TCP
		if len(info) >= 12 { // option, flg_mask, flg_cmp, invflags
			invert = info[11]
			if info[8] != 0 || info[9] != 0 {
				more = append(more, unknownTest("--tcp-flags"))
			}
		}
	}
	out := []FilterTest{fieldTest(FieldProtocol, nil, []byte{proto}, []byte{proto}, false)}
	for i, f := range []Field{FieldSourcePort, FieldPort} {
		from, to := port(4*i), port(4*i+2)
		all := binary.BigEndian.Uint16(from) == 0 && binary.BigEndian.Uint16(to) == 0xffff
		if not := invert&(1<<i) != 0; !all || not {
			out = append(out, fieldTest(f, nil, from, to, not))
		}
	}
	return append(out, more...)
}

// xtMultiport is struct xt_multiport_v1.
func xtMultiport(info []byte) []FilterTest {
	const sources, destinations = 0, 1
	var field Field
	switch info[0] {
	case sources:
		field = FieldSourcePort
	case destinations:
		field = FieldPort
	default:
		return []FilterTest{unknownTest("-m multiport --ports")}
	}
	t := FilterTest{Key: []FilterField{{Field: field}}, Not: info[47] != 0}
	port := func(i int) []byte {
		return binary.BigEndian.AppendUint16(nil, binary.NativeEndian.Uint16(info[2+2*i:]))
	}
	for i := 0; i < int(info[1]) && i < 15; i++ {
		r := FilterRange{port(i), port(i)}
		if info[32+i] != 0 && i+1 < 15 { // a range takes two
			i++
			r.To = port(i)
		}
		t.Any = append(t.Any, []FilterRange{r})
	}
	return []FilterTest{t}
}

// xtConntrack is struct xt_conntrack_mtinfo1 to 3, of which only the states are read.
func xtConntrack(rev uint32, info []byte) []FilterTest {
	const flagsAt, invertAt, statesAt, stateFlag = 146, 148, 150, 1
	flags, invert := binary.NativeEndian.Uint16(info[flagsAt:]), binary.NativeEndian.Uint16(info[invertAt:])
	states := uint32(binary.NativeEndian.Uint16(info[statesAt:]))
	if rev == 1 {
		states = uint32(info[statesAt])
	}
	if flags != stateFlag || states&^(StateInvalid|StateEstablished|StateRelated|StateNew|StateUntracked) != 0 {
		return []FilterTest{unknownTest("-m conntrack")}
	}
	return []FilterTest{bitTest(FieldState, states, invert&stateFlag != 0)}
}

// xtAddrtype is struct xt_addrtype_info_v1: bits by the type of the address, which the kernel numbers from 0 (RTN_UNSPEC).
func xtAddrtype(info []byte) []FilterTest {
	const invertDst = 2
	src, dst, flags := binary.NativeEndian.Uint16(info), binary.NativeEndian.Uint16(info[2:]), u32(info[4:])
	if src != 0 || flags&^invertDst != 0 {
		return []FilterTest{unknownTest("-m addrtype")}
	}
	t := FilterTest{Key: []FilterField{{Field: FieldTypeOfDst}}, Not: flags&invertDst != 0}
	for typ := range uint32(16) {
		if dst&(1<<typ) != 0 {
			v := binary.NativeEndian.AppendUint32(nil, typ)
			t.Any = append(t.Any, []FilterRange{{v, v}})
		}
	}
	return []FilterTest{t}
}

// xtTarget is what an extension does with a packet.
func xtTarget(name string) (FilterAction, []Field) {
	switch name {
	case "REJECT":
		return FilterAction{Verdict: Drop}, nil
	case "MASQUERADE", "SNAT":
		return FilterAction{Verdict: Translate}, nil
	case "LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "TCPMSS", "CHECKSUM", "CLASSIFY", "DSCP", "TOS", "TTL", "HL", "SET", "CONNSECMARK", "SECMARK", "RATEEST", "IDLETIMER", "LED":
		return FilterAction{}, nil
	case "MARK", "CONNMARK":
		return FilterAction{}, []Field{FieldMark}
	case "CT":
		return FilterAction{}, []Field{FieldState}
	}
	return FilterAction{Verdict: Unclear}, nil
}

// LegacyFilterChains reads the packet filter of iptables-legacy: the tables that there are in the network namespace of the calling
// thread; of the one that translates addresses, what may change the sender of packets that leave. It also counts the rules of all of them.
func LegacyFilterChains(f addr.Family) (chains []FilterChain, rules int, err error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if f == addr.IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	names, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	for table := range strings.FieldsSeq(string(names)) {
		cs, err := legacyTable(f, table)
		if err != nil {
			return chains, rules, fmt.Errorf("table %s of iptables-legacy: %w", table, err)
		}
		for _, c := range cs {
			rules += len(c.Rules)
		}
		for _, c := range cs {
			c.NAT = table == "nat" && c.Hook != ""
			if !c.NAT || c.Hook == "postrouting" {
				chains = append(chains, c)
			}
		}
	}
	return chains, rules, nil
}

func legacyTable(f addr.Family, table string) ([]FilterChain, error) {
	x := xtablesOf(f)
	info, entries, err := x.read(table)
	if err != nil {
		return nil, err
	}
	l := legacyParser{x: x, f: f, table: table, b: entries, starts: map[int]string{}}
	for hook, name := range []string{"prerouting", "input", "forward", "output", "postrouting"} {
		// struct ipt_getinfo: the name, the hooks that are valid, then where each begins
		if u32(info[xtNameLen:])&(1<<hook) != 0 {
			l.starts[int(u32(info[xtNameLen+4+4*hook:]))] = name
		}
	}
	return l.chains(), nil
}

// legacyParser reads a table as one run of entries: chains follow each other, and jumps are offsets.
type legacyParser struct {
	x      xtables
	f      addr.Family
	table  string
	b      []byte
	starts map[int]string // of the built-in chains, by hook
}

// targetAt is where in struct ipt_entry and struct ip6t_entry the offset of the target stands: two bytes before that of the next.
func (l legacyParser) targetAt(at int) int {
	return at + int(binary.NativeEndian.Uint16(l.b[at+l.x.next-2:]))
}

// entry bounds one entry; false at the end, or where the lengths make no sense.
func (l legacyParser) entry(at int) (target, end int, ok bool) {
	if at+l.x.counters+xtCountersLen > len(l.b) {
		return 0, 0, false
	}
	target, end = l.targetAt(at), at+int(binary.NativeEndian.Uint16(l.b[at+l.x.next:]))
	return target, end, target+32 <= end && end <= len(l.b) && end > at
}

// A match or target begins with its length (two bytes), its name (29) and its revision (one).
func xtHead(b []byte) (size int, name string, rev uint32) {
	return int(binary.NativeEndian.Uint16(b)), cString(b[2:31]), uint32(b[31])
}

func (l legacyParser) chains() []FilterChain {
	var out []FilterChain
	names := map[int]string{} // of the chains that users made, by the offset of their first rule
	for at := 0; ; {
		target, end, ok := l.entry(at)
		if !ok {
			break
		}
		if _, name, _ := xtHead(l.b[target:]); name == "ERROR" { // the head of a chain, or the table's end
			names[end] = cString(l.b[target+32 : min(target+62, end)])
		}
		at = end
	}
	for at := 0; ; {
		target, end, ok := l.entry(at)
		if !ok {
			break
		}
		hook, builtIn := l.starts[at]
		if builtIn {
			out = append(out, FilterChain{Family: map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"}[l.f], Table: l.table, Name: strings.ToUpper(hook), Hook: hook, Legacy: true, Priority: legacyPriority(l.table)})
		} else if name, ok := names[at]; ok {
			out = append(out, FilterChain{Family: map[addr.Family]string{addr.IPv4: "ip", addr.IPv6: "ip6"}[l.f], Table: l.table, Name: name, Legacy: true})
		}
		if _, name, _ := xtHead(l.b[target:]); name != "ERROR" && len(out) > 0 {
			c := &out[len(out)-1]
			c.Rules = append(c.Rules, l.rule(at, target, end, names))
		}
		at = end
	}
	for i := range out { // the last entry of each chain is its policy, or the return to who called it
		c := &out[i]
		if n := len(c.Rules); n > 0 && len(c.Rules[n-1].Tests) == 0 {
			if c.Hook != "" {
				c.Policy = string(c.Rules[n-1].Action.Verdict)
			}
			c.Rules = c.Rules[:n-1]
		}
	}
	return out
}

func legacyPriority(table string) int32 {
	return map[string]int32{"raw": -300, "mangle": -150, "filter": 0, "security": 50, "nat": 100}[table] // enum nf_ip_hook_priorities
}

// rule reads struct ipt_entry: the addresses and devices, then matches, then the target.
func (l legacyParser) rule(at, target, end int, names map[int]string) FilterRule {
	var r FilterRule
	e := l.b[at:end]
	size := l.f.Bits() / 8
	ifaces := 4 * size
	flagsAt := ifaces + 4*unix.IFNAMSIZ
	// struct ipt_ip: flags, then invflags behind the protocol; struct ip6t_ip6 has the type of service between.
	proto, inv := binary.NativeEndian.Uint16(e[flagsAt:]), e[flagsAt+3]
	if l.f == addr.IPv6 {
		inv = e[flagsAt+4]
	}
	// Bits of invflags (IPT_INV_*).
	const notIn, notOut, notSrc, notDst, notFrag, notProto = 1, 2, 8, 16, 32, 64
	for i, f := range []Field{FieldSource, FieldDestination} {
		value, mask := bytes.Clone(e[i*size:(i+1)*size]), bytes.Clone(e[(2+i)*size:(3+i)*size])
		if not := inv&[]byte{notSrc, notDst}[i] != 0; !zero(mask) || not {
			r.Tests = append(r.Tests, fieldTest(f, mask, value, value, not))
		}
	}
	for i, f := range []Field{FieldIn, FieldOut} {
		name := bytes.Clone(e[ifaces+i*unix.IFNAMSIZ : ifaces+(i+1)*unix.IFNAMSIZ])
		mask := bytes.Clone(e[ifaces+(2+i)*unix.IFNAMSIZ : ifaces+(3+i)*unix.IFNAMSIZ])
		if not := inv&[]byte{notIn, notOut}[i] != 0; !zero(mask) || not {
			for j := range name {
				name[j] &= mask[j]
			}
			r.Tests = append(r.Tests, fieldTest(f, mask, name, name, not))
		}
	}
	if proto != 0 {
		p := []byte{byte(proto)}
		r.Tests = append(r.Tests, fieldTest(FieldProtocol, nil, p, p, inv&notProto != 0))
	}
	if l.f == addr.IPv4 && (e[flagsAt+2]&1 != 0 || inv&notFrag != 0) {
		r.Tests = append(r.Tests, unknownTest("-f"))
	}
	for m := at + l.x.counters + xtCountersLen; m+32 <= target; {
		n, name, rev := xtHead(l.b[m:])
		if n < 32 || m+n > target {
			r.Tests = append(r.Tests, unknownTest("match"))
			break
		}
		r.Tests = append(r.Tests, xtMatch(name, rev, l.b[m+32:m+n])...)
		m += n
	}
	_, name, _ := xtHead(l.b[target:])
	if name != "" {
		r.Action, r.Changes = xtTarget(name)
		return r
	}
	r.Action = l.standard(int32(u32(l.b[target+32:])), end, e, flagsAt, names)
	return r
}

// standard is a verdict as iptables-legacy has it: a negative one ends the way, any other is where to go on.
func (l legacyParser) standard(v int32, end int, e []byte, flagsAt int, names map[int]string) FilterAction {
	const drop, accept, ret, flagGoto = -1, -2, -5, 2
	switch v {
	case drop:
		return FilterAction{Verdict: Drop}
	case accept:
		return FilterAction{Verdict: Accept}
	case ret:
		return FilterAction{Verdict: Return}
	}
	switch {
	case v < 0:
		return FilterAction{Verdict: Unclear}
	case int(v) == end: // falls through to the next rule
		return FilterAction{}
	}
	flags := e[flagsAt+2]
	if l.f == addr.IPv6 {
		flags = e[flagsAt+3]
		if flags&4 != 0 { // IP6T_F_GOTO
			return FilterAction{Goto, names[int(v)]}
		}
		return FilterAction{Jump, names[int(v)]}
	}
	if flags&flagGoto != 0 { // IPT_F_GOTO
		return FilterAction{Goto, names[int(v)]}
	}
	return FilterAction{Jump, names[int(v)]}
}
