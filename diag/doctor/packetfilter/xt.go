package packetfilter

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// xtMatch turns an extension of iptables into tests. One that is not known here is a test that can't be judged.
func xtMatch(e *expr.Match) []Test {
	const invertDest = 2 // XT_ADDRTYPE_INVERT_DEST of uapi/linux/netfilter/xt_addrtype.h
	switch info := e.Info.(type) {
	case *xt.Comment:
		return nil
	case *xt.Udp:
		return xtPorts(info.SrcPorts, info.DstPorts, info.InvFlags, xt.UdpInvSrcPorts, xt.UdpInvDestPorts)
	case *xt.Tcp:
		out := xtPorts(info.SrcPorts, info.DstPorts, info.InvFlags, xt.TcpInvSrcPorts, xt.TcpInvDestPorts)
		if info.FlagsMask != 0 || info.Option != 0 {
			out = append(out, unknownTest("--tcp-flags"))
		}
		return out
	case *xt.ConntrackMtinfo3: // since iptables 1.4.8
		return xtConntrack(info.ConntrackMtinfoBase, info.StateMask)
	case *xt.AddrTypeV1:
		if info.Source == 0 && info.Flags&^invertDest == 0 {
			return xtAddrtype(info)
		}
	case *xt.Unknown:
		switch b := *info; {
		case e.Name == "multiport" && e.Rev == 1 && len(b) >= 48:
			return xtMultiport(b)
		case e.Name == "mark" && e.Rev == 1 && len(b) >= 9: // struct xt_mark_mtinfo1
			return []Test{equalTest(Mark, b[4:8], b[:4], b[8] != 0)}
		}
	}
	return []Test{unknownTest("-m " + e.Name)}
}

func xtPorts[F ~uint8](from, to [2]uint16, flags, notFrom, notTo F) []Test {
	var out []Test
	add := func(f Field, ports [2]uint16, not bool) {
		if all := [2]uint16{0, 0xffff}; ports != all || not {
			out = append(out, rangesTest(f, not, Range{port16(ports[0]), port16(ports[1])}))
		}
	}
	add(SourcePort, from, flags&notFrom != 0)
	add(Port, to, flags&notTo != 0)
	return out
}

// xtConntrack knows states, and whether the packet's connection was given another destination (XT_CONNTRACK_STATE_* of
// uapi/linux/netfilter/xt_conntrack.h).
func xtConntrack(base xt.ConntrackMtinfoBase, states uint16) []Test {
	const dnat, untracked = 1 << 7, 1 << 8
	not := base.InvertFlags&uint16(xt.ConntrackState) != 0
	bits := uint32(states & (StateInvalid | StateEstablished | StateRelated | StateNew))
	if states&untracked != 0 {
		bits |= StateUntracked
	}
	switch rest := states &^ (untracked | uint16(bits)); {
	case base.MatchFlags&^uint16(xt.ConntrackStateAlias) != uint16(xt.ConntrackState):
	case rest == 0:
		return []Test{bitTest(State, bits, not)}
	case rest == dnat && bits == 0:
		return []Test{bitTest(Status, statusDNAT, not)}
	}
	return []Test{unknownTest("-m conntrack")}
}

// xtAddrtype has bits by the type of the address, which the kernel numbers from 0 (RTN_UNSPEC).
func xtAddrtype(info *xt.AddrTypeV1) []Test {
	var types []Range
	for typ := range uint32(16) {
		if info.Dest&(1<<typ) != 0 {
			types = append(types, Range{native32(typ), native32(typ)})
		}
	}
	return []Test{rangesTest(TypeOfAddress, info.Flags != 0, types...)}
}

// xtMultiport is struct xt_multiport_v1.
func xtMultiport(b []byte) []Test {
	const sources, destinations, most = 0, 1, 15
	if b[0] != sources && b[0] != destinations {
		return []Test{unknownTest("-m multiport --ports")}
	}
	var ports []Range
	port := func(i int) []byte { return port16(binary.NativeEndian.Uint16(b[2+2*i:])) }
	for i := 0; i < min(int(b[1]), most); i++ {
		r := Range{port(i), port(i)}
		if b[32+i] != 0 && i+1 < most { // a range takes two
			i++
			r.To = port(i)
		}
		ports = append(ports, r)
	}
	return []Test{rangesTest([]Field{sources: SourcePort, destinations: Port}[b[0]], b[47] != 0, ports...)}
}

// xtTarget is what an extension does with a packet, and what it changes of it.
func xtTarget(name string) (Action, Field) {
	switch name {
	case "REJECT":
		return Action{Verdict: Drop}, ""
	case "MASQUERADE", "SNAT":
		return Action{Verdict: Translate}, ""
	case "LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "TCPMSS", "CHECKSUM", "CLASSIFY", "DSCP", "TOS", "TTL", "HL", "SET",
		"CONNSECMARK", "SECMARK", "RATEEST", "IDLETIMER", "LED":
		return Action{}, ""
	case "CT":
		return Action{}, State
	case "MARK", "CONNMARK":
		return Action{}, Mark
	}
	return Action{Verdict: Unclear}, Mark
}
