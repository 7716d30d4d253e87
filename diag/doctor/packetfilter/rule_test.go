package packetfilter

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// Whatever rules another program writes, they are read, judged and shown.
func TestAnyRules(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	number := func(n uint32) uint32 { return random.Uint32N(n) }
	data := func() []byte {
		b := make([]byte, []int{0, 1, 2, 3, 4, 8, 16}[random.IntN(7)])
		for i := range b {
			b[i] = byte(number(3))
		}
		return b
	}
	reg := func() uint32 { return []uint32{0, 1, 2, 8, 9, 10}[random.IntN(6)] }
	one := func() expr.Any {
		info := xt.Unknown(append(data(), data()...))
		switch number(22) {
		case 0, 1, 2:
			return &expr.Payload{DestRegister: reg(), Base: expr.PayloadBase(number(4)), Offset: number(18), Len: number(20)}
		case 3:
			return &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg(), Base: 1, Offset: 12, Len: number(9)}
		case 4, 5:
			return &expr.Meta{Key: expr.MetaKey(number(20)), Register: reg(), SourceRegister: number(4) == 0}
		case 6, 7:
			return &expr.Ct{Key: expr.CtKey(number(4)), Register: reg()}
		case 8:
			return &expr.Bitwise{SourceRegister: reg(), DestRegister: reg(), Mask: data(), Xor: data()}
		case 9, 10, 11, 12:
			return &expr.Cmp{Op: expr.CmpOp(number(6)), Register: reg(), Data: data()}
		case 13:
			return &expr.Range{Op: expr.CmpOp(number(2)), Register: reg(), FromData: data(), ToData: data()}
		case 14, 15:
			return &expr.Lookup{
				SourceRegister: reg(), SetName: []string{"set", "map", "empty"}[number(3)], Invert: number(2) == 0,
				IsDestRegSet: number(2) == 0, DestRegister: reg(),
			}
		case 16:
			return &expr.Immediate{Register: reg(), Data: data()}
		case 17:
			return &expr.Match{Name: []string{"mark", "multiport"}[number(2)], Rev: 1, Info: &info}
		case 18:
			return &expr.Target{Name: []string{"MARK", "TEE", "REJECT"}[number(3)]}
		case 19:
			return &expr.Objref{Type: int(number(12))}
		case 20:
			return &expr.Fib{Register: reg(), ResultOIF: true, FlagPRESENT: true, FlagSADDR: true, FlagIIF: true}
		}
		return &expr.Verdict{Kind: expr.VerdictKind(int(number(11)) - 5), Chain: "c"}
	}
	p := Packet{
		Source: netip.MustParseAddr("192.0.2.2"), Destination: netip.MustParseAddr("192.0.2.1"), Protocol: unix.IPPROTO_UDP,
		In: Device{"eth0", 2}, Port: 8472,
	}
	for range 5_000 {
		families := []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet}
		family := families[number(3)]
		table := &nftables.Table{Family: family, Name: "t"}
		r := &reader{sets: map[chainKey]*set{{family, "t", "empty"}: {}}}
		for _, name := range []string{"set", "map"} {
			var elements []nftables.SetElement
			for range number(4) {
				elements = append(elements, nftables.SetElement{Key: data(), Val: data(), IntervalEnd: number(3) == 0})
			}
			elements = append(elements, nftables.SetElement{}) // for what is in no other
			s := &nftables.Set{Table: table, Interval: number(2) == 0, Concatenation: number(2) == 0}
			read := setOf(s, elements)
			r.sets[chainKey{family, "t", name}] = &read
		}
		c := Chain{Family: familyName(family), Table: "t", Name: "c", Hook: "input", Policy: "accept"}
		for range number(4) {
			var exprs []expression
			for range number(8) {
				exprs = append(exprs, expression{"any", one()})
			}
			c.Rules = append(c.Rules, r.parse(table, exprs)...)
		}
		Filter{c}.Through(p, "input")
	}
}

// synproxy takes the SYN that it answers, as a statement and as an object with a name; a quota decides nothing.
func TestSynProxyIsUnclear(t *testing.T) {
	t.Parallel()
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "t"}
	for name, tt := range map[string]struct {
		e       expression
		verdict Verdict
	}{
		"statement": {expression{name: "synproxy"}, Unclear},
		"object":    {expression{"objref", &expr.Objref{Type: int(nftables.ObjTypeSynProxy), Name: "x"}}, Unclear},
		"quota":     {expression{"objref", &expr.Objref{Type: int(nftables.ObjTypeQuota), Name: "x"}}, ""},
	} {
		rules := (&reader{}).parse(table, []expression{tt.e})
		if len(rules) != 1 || rules[0].Action.Verdict != tt.verdict || len(rules[0].Tests) != 1 {
			t.Errorf("%s: %+v, want the verdict %q behind a test that is not known", name, rules, tt.verdict)
		}
	}
}
