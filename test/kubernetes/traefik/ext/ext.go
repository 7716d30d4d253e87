// Package ext stands in for a module that traefik keeps beside its own, and that only its own build finds.
package ext

// HTTP extends the configuration.
type HTTP struct{}

// Router extends a router.
type Router struct{}
