package packetfilter

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// TryMasquerade adds a rule that masquerades to the network namespace of the calling thread. Its error says what the
// kernel lacks.
func TryMasquerade() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	const trial = "trial"
	t := c.AddTable(&nftables.Table{Name: trial, Family: nftables.TableFamilyIPv4})
	chain := c.AddChain(&nftables.Chain{
		Name: trial, Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityNATSource,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
	return c.Flush()
}
