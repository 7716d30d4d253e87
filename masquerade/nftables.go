package masquerade

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// NFTables is the Driver on nftables, with a table of our own in each family: the chain at the postrouting hook and the
// sets that it looks into. What differs is put right by one transaction for each family.
//
// The forward chain is not there, since it could not do what it is for. In nftables an accept ends nothing but the chain
// of the one who says it, and each table at the hook has its say; so nobody needs it where nobody drops, and it helps
// nobody where somebody does. The one who does is, on most hosts, iptables' own FORWARD chain, whose policy Docker sets to
// DROP. There the accepts are needed, and only there they work. So this driver puts them there, by way of iptables,
// wherever that chain exists, and makes none where it does not.
//
// What is there is read from the kernel; a process is started for a change alone. With a Watch nobody looks while it has heard
// of no change.
type NFTables struct {
	host
	memory   memory
	sets     Sets // for what the other driver left; nil: none
	written  addr.Per[nftWriting]
	setsGone addr.Per[bool]

	// The accepts in FORWARD, in both places where iptables may have one.
	forward, legacy *IPTables
	unheard         addr.Per[bool] // there are some in iptables-legacy, where the Watch hears nothing
}

// nftWriting remembers how this nft prints what we wrote.
type nftWriting struct{ rendered, printed nftTable }

// NewNFTables makes the driver; it starts no process and needs no program until it is used. The wait is for the xtables
// lock, where iptables is needed; zero means DefaultWait.
func NewNFTables(wait time.Duration) *NFTables {
	return &NFTables{host: newHost(nil), forward: newGuest(VariantNFT, wait), legacy: newGuest(VariantLegacy, wait)}
}

// use says what to work with.
func (d *NFTables) use(h host) { d.host, d.forward.host, d.legacy.host = h, h, h }

func newGuest(v Variant, wait time.Duration) *IPTables {
	d := NewIPTables(v, wait)
	d.guest = true
	return d
}

var _ Driver = (*NFTables)(nil)

// Ensure implements Driver.
func (d *NFTables) Ensure(ctx context.Context, want []Ruleset) (Result, error) {
	return d.memory.rounds(func() (Result, error) {
		return eachFamily(want, func(rs Ruleset) (Result, error) { return d.ensureFamily(ctx, rs) })
	})
}

// Notified implements Driver.
func (d *NFTables) Notified() bool {
	return d.memory.complete() && !d.unheard.V4 && !d.unheard.V6
}

func (d *NFTables) ensureFamily(ctx context.Context, rs Ruleset) (res Result, err error) {
	res.Drifts, err = d.memory.look(rs, func() ([]Drift, error) { return d.repair(ctx, rs) })
	if err != nil {
		return res, err
	}
	drifts, err := d.ensureLegacy(ctx, rs)
	res.Drifts = append(res.Drifts, drifts...)
	if err != nil {
		return res, err
	}
	return res, d.dropSets(rs.Family)
}

// repair looks once at all that the Watch hears of.
func (d *NFTables) repair(ctx context.Context, rs Ruleset) ([]Drift, error) {
	drifts, err := d.repairTable(ctx, rs)
	if err != nil {
		return drifts, err
	}
	more, err := d.repairForward(ctx, rs)
	return append(drifts, more...), err
}

// repairTable makes our own table the wanted one.
func (d *NFTables) repairTable(ctx context.Context, rs Ruleset) ([]Drift, error) {
	have, err := d.readNFT(rs.Family)
	if err != nil {
		return nil, err
	}
	want := nftTableOf(rs)
	expected := want
	if w := d.written.Get(rs.Family); w.rendered.equal(want) {
		expected = w.printed
	}
	if have.equal(want) || have.equal(expected) {
		return nil, nil
	}
	if err := d.changeNFT(ctx, rs, have, expected); err != nil {
		return nil, err
	}
	return nftDifferences(rs.Family, have, expected), d.readBack(want)
}

// readBack looks at what was just written and remembers how it is printed.
func (d *NFTables) readBack(want nftTable) error {
	printed, err := d.readNFT(want.family)
	if err != nil {
		return err
	}
	if !printed.equal(want) && !printed.alike(want) {
		return fmt.Errorf("table %s is not as it was just written: another program may be writing there too", nftTableName)
	}
	d.written.Set(want.family, nftWriting{want, printed})
	return nil
}

// repairForward keeps the accepts in the FORWARD chain of iptables-nft while there is one, and nothing else of ours in
// iptables-nft: so what the other driver left there goes as well.
func (d *NFTables) repairForward(ctx context.Context, rs Ruleset) ([]Drift, error) {
	want := Ruleset{Family: rs.Family}
	if forward := rs.only(forward()); len(forward.Chains) > 0 {
		policy, err := d.forwardPolicy(rs.Family)
		if err != nil {
			return nil, err
		}
		if policy != "" {
			want = forward
		}
		if policy == nftAccept && !programThere(rs.Family, VariantNFT) {
			return nil, nil // nobody drops, and nobody here could say more
		}
	}
	res, err := d.forward.ensureFamily(ctx, want)
	if errors.Is(err, exec.ErrNotFound) {
		err = fmt.Errorf("the FORWARD chain drops by default, and the program that could accept the pods' packets in it is missing: %w", err)
	}
	return res.Drifts, err
}

// ensureLegacy does the same in iptables-legacy. Its tables exist only where somebody uses them.
func (d *NFTables) ensureLegacy(ctx context.Context, rs Ruleset) ([]Drift, error) {
	exists, err := legacyTable(rs.Family, Filter)
	if err != nil {
		return nil, err
	}
	want := Ruleset{Family: rs.Family}
	if exists && programThere(rs.Family, VariantLegacy) {
		want = rs.only(forward())
	}
	d.unheard.Set(rs.Family, len(want.Chains) > 0)
	res, err := d.legacy.ensureFamily(ctx, want)
	return res.Drifts, err
}

func programThere(f addr.Family, v Variant) bool {
	_, err := exec.LookPath(programName(f, v) + "-restore")
	return err == nil
}

// dropSets removes once the sets that the other driver's rules named.
func (d *NFTables) dropSets(f addr.Family) error {
	if d.sets == nil || d.setsGone.Get(f) {
		return nil
	}
	for _, name := range setNames(f) {
		if err := d.sets.Remove(name); err != nil {
			return err
		}
	}
	d.setsGone.Set(f, true)
	return nil
}

// Remove implements Driver: the same as with the other driver.
func (d *NFTables) Remove(ctx context.Context) error {
	all := NewIPTables(VariantDefault, d.forward.wait)
	all.host, all.sets = d.host, d.sets
	d.forward.forget()
	d.legacy.forget()
	d.memory.seen, d.written = addr.Per[sighting]{}, addr.Per[nftWriting]{}
	d.setsGone, d.unheard = addr.Per[bool]{}, addr.Per[bool]{}
	return all.Remove(ctx)
}
