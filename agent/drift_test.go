package agent

import (
	"testing"
	"testing/synctest"
)

// What was counted and not logged yet is logged at the end of the daemon.
func TestDriftIsLoggedAtTheEnd(t *testing.T) {
	inRig(t, func(r *rig) {
		synctest.Wait()
		for range 3 {
			r.agent.drift.count("route", 1, "add route 10.244.101.0/24")
			r.sleep(driftDelay)
		}
		r.stop()
		if r.logged("reverted external change") != 2 || r.logged("count:2 kind:route") != 1 {
			t.Errorf("%v", r.logs.All())
		}
	})
}
