package netstate

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// This file reads the rules of nf_tables: a rule is a list of expressions, little programs for a machine with registers. They are
// turned back into what iptables would print of them. Known is what iptables and nft make of the matches that we use ourselves, in
// the ways that their versions do; everything else stays visible as unknown, with all its bytes.

// nfRule is a rule, read.
type nfRule struct {
	family   addr.Family
	chain    string
	regs     map[uint32]operand
	src, dst string // with their flags, as the next two
	in, out  string
	matches  []string
	sets     []uint16 // for the matches that are setPlaceholder, in order
	comment  string
	verdict  []string
}

// operand is what a register holds: a part of the packet or of what is known about it, seen through a mask.
type operand struct {
	flag string // that iptables has for it
	size int    // of all of it
	mask []byte // nil: nothing is masked
}

const (
	flagMark = "--mark"
	// setPlaceholder stands where the name of a set goes, which has to be asked for.
	setPlaceholder = "\x00"
)

// parseNFRule reads the attributes of a rule.
func parseNFRule(f addr.Family, attrs []byte) nfRule {
	r := nfRule{family: f, regs: map[uint32]operand{}}
	var comment string
	eachAttr(attrs, func(typ uint16, data []byte) {
		switch typ {
		case unix.NFTA_RULE_CHAIN:
			r.chain = cString(data)
		case unix.NFTA_RULE_EXPRESSIONS:
			eachAttr(data, func(_ uint16, expr []byte) {
				name, body := cString(attrOf(expr, unix.NFTA_EXPR_NAME)), attrOf(expr, unix.NFTA_EXPR_DATA)
				if !r.take(name, body) {
					r.matches = append(r.matches, "?"+name+":"+hex.EncodeToString(body))
				}
			})
		case unix.NFTA_RULE_USERDATA:
			comment = userComment(data)
		}
	})
	if r.comment == "" {
		r.comment = comment
	}
	return r
}

// userComment finds nft's comment in what the kernel only keeps: records of a type, a length and a value.
func userComment(b []byte) string {
	const typeComment = 0 // NFTNL_UDATA_RULE_COMMENT
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		if b[0] == typeComment {
			return cString(b[2 : 2+int(b[1])])
		}
		b = b[2+int(b[1]):]
	}
	return ""
}

// words is the rule as iptables prints it.
func (r nfRule) words(setName func(uint16) string) []string {
	words := []string{"-A", r.chain}
	for _, w := range []string{r.src, r.dst, r.in, r.out} {
		words = append(words, strings.Fields(w)...)
	}
	sets := r.sets
	for _, m := range r.matches {
		for w := range strings.FieldsSeq(m) {
			if w == setPlaceholder {
				w, sets = setName(sets[0]), sets[1:]
			}
			words = append(words, w)
		}
	}
	if r.comment != "" {
		words = append(words, "-m", "comment", "--comment", r.comment)
	}
	return append(words, r.verdict...)
}

// take reads one expression; false if it is not known.
func (r *nfRule) take(name string, b []byte) bool {
	switch name {
	case "counter":
		return true
	case "payload":
		return r.takePayload(b)
	case "meta":
		return r.takeMeta(b)
	case "bitwise":
		return r.takeBitwise(b)
	case "cmp":
		return r.takeCmp(b)
	case "lookup":
		return r.takeLookup(b)
	case "match":
		return r.takeMatch(cString(attrOf(b, unix.NFTA_MATCH_NAME)), be32(attrOf(b, unix.NFTA_MATCH_REV)), attrOf(b, unix.NFTA_MATCH_INFO))
	case "target":
		return r.takeTarget(cString(attrOf(b, unix.NFTA_TARGET_NAME)), be32(attrOf(b, unix.NFTA_TARGET_REV)), attrOf(b, unix.NFTA_TARGET_INFO))
	case "masq":
		return attrOf(b, unix.NFTA_MASQ_REG_PROTO_MIN) == nil && r.masquerade(be32(attrOf(b, unix.NFTA_MASQ_FLAGS)))
	case "immediate":
		return r.takeImmediate(b)
	case "reject": // how it is refused is left out
		return r.end("-j", "REJECT")
	case "log", "limit": // with what, and how many, is left out
		r.matches = append(r.matches, "-m "+name)
		return true
	}
	return false
}

// takePayload loads a part of the packet: an address, or its first bytes.
func (r *nfRule) takePayload(b []byte) bool {
	size, src, dst := uint32(4), uint32(12), uint32(16)
	if r.family == addr.IPv6 {
		size, src, dst = 16, 8, 24
	}
	flag := map[uint32]string{src: "-s", dst: "-d"}[be32(attrOf(b, unix.NFTA_PAYLOAD_OFFSET))]
	if flag == "" || be32(attrOf(b, unix.NFTA_PAYLOAD_BASE)) != unix.NFT_PAYLOAD_NETWORK_HEADER ||
		be32(attrOf(b, unix.NFTA_PAYLOAD_LEN)) > size || attrOf(b, unix.NFTA_PAYLOAD_SREG) != nil {
		return false
	}
	r.regs[be32(attrOf(b, unix.NFTA_PAYLOAD_DREG))] = operand{flag: flag, size: int(size)}
	return true
}

func (r *nfRule) takeMeta(b []byte) bool {
	var o operand
	switch be32(attrOf(b, unix.NFTA_META_KEY)) {
	case unix.NFT_META_MARK:
		o = operand{flag: flagMark, size: 4}
	case unix.NFT_META_IIFNAME:
		o = operand{flag: "-i", size: unix.IFNAMSIZ}
	case unix.NFT_META_OIFNAME:
		o = operand{flag: "-o", size: unix.IFNAMSIZ}
	default:
		return false
	}
	if attrOf(b, unix.NFTA_META_SREG) != nil { // sets it
		return false
	}
	r.regs[be32(attrOf(b, unix.NFTA_META_DREG))] = o
	return true
}

// takeBitwise puts a mask on a register; other operations have a type, or bits that they turn.
func (r *nfRule) takeBitwise(b []byte) bool {
	const nftaBitwiseOp = 6
	o, ok := r.regs[be32(attrOf(b, unix.NFTA_BITWISE_SREG))]
	if !ok || o.mask != nil || be32(attrOf(b, nftaBitwiseOp)) != 0 || !zero(valueOf(b, unix.NFTA_BITWISE_XOR)) {
		return false
	}
	o.mask = bytes.Clone(valueOf(b, unix.NFTA_BITWISE_MASK))
	r.regs[be32(attrOf(b, unix.NFTA_BITWISE_DREG))] = o
	return true
}

func (r *nfRule) takeCmp(b []byte) bool {
	o, ok := r.regs[be32(attrOf(b, unix.NFTA_CMP_SREG))]
	not, op := "", be32(attrOf(b, unix.NFTA_CMP_OP))
	if op == unix.NFT_CMP_NEQ {
		not = "! "
	}
	value := valueOf(b, unix.NFTA_CMP_DATA)
	if !ok || op > unix.NFT_CMP_NEQ || len(value) > o.size || o.mask != nil && len(o.mask) != len(value) {
		return false
	}
	switch o.flag {
	case "-s", "-d":
		p, ok := maskedPrefix(value, o)
		return ok && fill(map[string]*string{"-s": &r.src, "-d": &r.dst}[o.flag], not+o.flag+" "+p.String())
	case "-i", "-o":
		name, ok := deviceName(value)
		return ok && o.mask == nil && fill(map[string]*string{"-i": &r.in, "-o": &r.out}[o.flag], not+o.flag+" "+name)
	}
	mask := o.mask
	if mask == nil {
		mask = []byte{0xff, 0xff, 0xff, 0xff}
	}
	return len(value) == o.size && r.mark(u32(value), u32(mask), not)
}

// fill writes what must not have been written before.
func fill(slot *string, text string) bool {
	if *slot != "" {
		return false
	}
	*slot = text
	return true
}

// maskedPrefix is the prefix whose addresses have this value under the mask. A comparison of the first bytes masks the rest.
func maskedPrefix(value []byte, o operand) (netip.Prefix, bool) {
	whole := make([]byte, o.size)
	copy(whole, value)
	a, _ := netip.AddrFromSlice(whole)
	length := 8 * len(value)
	if o.mask != nil {
		length = 0
		for i, m := range o.mask {
			ones := bits.LeadingZeros8(^m)
			if m<<ones != 0 || ones > 0 && length != 8*i { // not ones, then zeros
				return netip.Prefix{}, false
			}
			length += ones
		}
	}
	p := netip.PrefixFrom(a, length)
	return p, p.Masked() == p
}

// deviceName reads a name with its end; without, it is what names begin with.
func deviceName(value []byte) (string, bool) {
	name, rest, ended := bytes.Cut(value, []byte{0})
	if !ended {
		name = append(bytes.Clone(name), '+')
	}
	return string(name), len(name) > 0 && zero(rest) && !bytes.ContainsAny(name, " \t\n"+setPlaceholder)
}

func (r *nfRule) mark(value, mask uint32, not string) bool {
	text := fmt.Sprintf("-m mark %s%s 0x%x", not, flagMark, value)
	if mask != ^uint32(0) {
		text += fmt.Sprintf("/0x%x", mask)
	}
	r.matches = append(r.matches, text)
	return true
}

// takeLookup is nft's way to look into a set.
func (r *nfRule) takeLookup(b []byte) bool {
	o := r.regs[be32(attrOf(b, unix.NFTA_LOOKUP_SREG))]
	set := cString(attrOf(b, unix.NFTA_LOOKUP_SET))
	flags := be32(attrOf(b, unix.NFTA_LOOKUP_FLAGS))
	if o.flag != "-d" || o.mask != nil || flags&^unix.NFT_LOOKUP_F_INV != 0 ||
		attrOf(b, unix.NFTA_LOOKUP_DREG) != nil || set == "" {
		return false
	}
	r.inSet(set, flags != 0)
	return true
}

// inSet notes a match of the destination on a set.
func (r *nfRule) inSet(set string, not bool) {
	r.matches = append(r.matches, "-m set "+map[bool]string{true: "! "}[not]+"--match-set "+set+" dst")
}

// takeMatch reads an extension of iptables, whose data is a C structure.
func (r *nfRule) takeMatch(name string, rev uint32, info []byte) bool {
	switch {
	case name == "comment" && r.comment == "":
		r.comment = cString(info)
		return r.comment != ""
	case name == "mark" && rev == 1 && len(info) >= 9: // struct xt_mark_mtinfo1
		return r.mark(u32(info), u32(info[4:]), map[bool]string{true: "! "}[info[8] != 0])
	case name == "set" && rev >= 1 && len(info) >= 4: // struct xt_set_info: index, dimensions, flags; then what we have no use for
		const inverted = 1 // IPSET_INV_MATCH
		if info[2] != 1 || info[3]&^inverted != 0 || !zero(info[4:]) {
			return false
		}
		r.sets = append(r.sets, binary.NativeEndian.Uint16(info))
		r.inSet(setPlaceholder, info[3] != 0)
		return true
	}
	return false
}

// takeTarget reads an extension of iptables.
func (r *nfRule) takeTarget(name string, rev uint32, info []byte) bool {
	if name == "REJECT" || name == "LOG" || name == "NFLOG" { // with what is left out
		return r.end("-j", name)
	}
	if r.family == addr.IPv4 { // struct nf_nat_ipv4_multi_range_compat: the number of ranges; for IPv6 there is one
		if len(info) < 8 || u32(info) != 1 {
			return false
		}
		info = info[4:]
	}
	return name == "MASQUERADE" && rev == 0 && len(info) >= 4 && zero(info[4:]) && r.masquerade(u32(info))
}

func (r *nfRule) masquerade(flags uint32) bool {
	switch flags {
	case 0:
		return r.end("-j", "MASQUERADE")
	case unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY:
		return r.end("-j", "MASQUERADE", "--random-fully")
	}
	return false
}

// takeImmediate reads a verdict; other values for a register are not known.
func (r *nfRule) takeImmediate(b []byte) bool {
	verdict := attrOf(attrOf(b, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
	if be32(attrOf(b, unix.NFTA_IMMEDIATE_DREG)) != unix.NFT_REG_VERDICT || verdict == nil {
		return false
	}
	chain := cString(attrOf(verdict, unix.NFTA_VERDICT_CHAIN))
	switch code := int32(be32(attrOf(verdict, unix.NFTA_VERDICT_CODE))); code {
	case unix.NFT_JUMP:
		return r.end("-j", chain)
	case unix.NFT_GOTO:
		return r.end("-g", chain)
	default:
		return r.end("-j", strings.ToUpper(verdictName(code)))
	}
}

func verdictName(code int32) string {
	const drop, accept = 0, 1
	switch code {
	case drop:
		return "drop"
	case accept:
		return "accept"
	case unix.NFT_RETURN:
		return "return"
	}
	return fmt.Sprintf("?%d", code)
}

func (r *nfRule) end(verdict ...string) bool {
	if r.verdict != nil {
		return false
	}
	r.verdict = verdict
	return true
}

// valueOf is the bytes in an attribute that holds data.
func valueOf(b []byte, typ uint16) []byte { return attrOf(attrOf(b, typ), unix.NFTA_DATA_VALUE) }

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
